// Moving rows. What it computes and how the work is split: cpu/merging/merge.h.
#include "cpu/merging/merge.h"

#define MLIP_KERNELS "cpu/merging/merge.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

// a b, rounded before anything is added to it.
template <typename A>
static inline Vector<A> rounded_product(Vector<A> a, Vector<A> b) {
  Vector<A> product = a * b;
#if MLIP_X86
  asm("" : "+x"(product));  // otherwise the compiler fuses the product with the addition behind it
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

template <bool STREAMED, typename T>
static void copy_row(const T* from, int64_t channels, T* to) {
  if constexpr (STREAMED) {
    constexpr int64_t VECTOR = MLIP_VECTOR_BYTES / int64_t(sizeof(float));
    const int64_t words = channels * int64_t(sizeof(T)) / int64_t(sizeof(float));
    const auto* read = reinterpret_cast<const char*>(from);
    auto* written = reinterpret_cast<float*>(to);
    for (int64_t k = 0; k < words; k += VECTOR) {
      Vector<float> bits;
      std::memcpy(&bits, read + k * int64_t(sizeof(float)), sizeof bits);
      stream(written + k, bits);
    }
  } else {
    std::memcpy(static_cast<void*>(to), from, size_t(channels) * sizeof(T));
  }
}

template <bool STREAMED, typename T, typename A>
static inline void put(T* to, Vector<A> v) {
  if constexpr (STREAMED) {
    stream(to, v);
  } else {
    store(to, v);
  }
}

// to = weight from
template <bool STREAMED, typename T, typename A = Accumulate<T>>
static void scale_row(const T* from, A weight, int64_t channels, T* to) {
  const Vector<A> w = broadcast(weight);
  const int64_t whole = channels - channels % LANES<A>;
  for (int64_t c = 0; c < whole; c += LANES<A>) put<STREAMED, T, A>(to + c, w * load(from + c));
  if (whole < channels) store(to + whole, w * load(from + whole, channels - whole), channels - whole);
}

// One term of a sum: a row and its weight.
template <typename T>
struct Term {
  const T* row;
  Accumulate<T> weight;
};

template <bool STREAMED, typename T, typename A = Accumulate<T>>
static void sum_rows(const Term<T>* terms, int64_t count, int64_t channels, T* to) {
  const int64_t whole = channels - channels % LANES<A>;
  for (int64_t c = 0; c < whole; c += LANES<A>) {
    Vector<A> total = rounded_product<A>(load(terms[0].row + c), broadcast(terms[0].weight));
    for (int64_t k = 1; k < count; ++k) {
      total += rounded_product<A>(load(terms[k].row + c), broadcast(terms[k].weight));
    }
    put<STREAMED, T, A>(to + c, total);
  }
  if (const int64_t rest = channels - whole) {
    Vector<A> total = rounded_product<A>(load(terms[0].row + whole, rest), broadcast(terms[0].weight));
    for (int64_t k = 1; k < count; ++k) {
      total += rounded_product<A>(load(terms[k].row + whole, rest), broadcast(terms[k].weight));
    }
    store(to + whole, total, rest);
  }
}

// The removed rows of a sample as one list per output row, in the order given: first[o], then next[first[o]], up to -1.
static inline void list_by_output(const RowIndices& p, int64_t b, int64_t* first, int64_t* next) {
  const int64_t merged = p.tokens - p.outputs;
  const int64_t *removed = p.removed + b * merged, *assignment = p.assignment + b * p.tokens;
  for (int64_t o = 0; o < p.outputs; ++o) first[o] = -1;
  for (int64_t k = merged - 1; k >= 0; --k) {
    const int64_t n = removed[k], o = assignment[n];
    if (p.lost(b, n)) continue;
    next[n] = first[o];
    first[o] = n;
  }
}

template <bool STREAMED, typename T, typename A = Accumulate<T>>
static void combine_as(const MergeRows<T>& p, int64_t begin, int64_t end) {
  const int64_t block = p.block(), blocks = p.blocks();
  Scratch term_memory(size_t(p.tokens) * sizeof(Term<T>)), list_memory(size_t(2 * p.tokens) * sizeof(int64_t));
  Term<T>* terms = term_memory.as<Term<T>>();
  int64_t *first = list_memory.as<int64_t>(), *next = first + p.tokens;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, from = task % blocks * block;
    const int64_t to = from + block < p.tokens ? from + block : p.tokens;
    const int64_t *kept = p.kept + b * p.outputs, *assignment = p.assignment + b * p.tokens;
    const auto term = [&](int64_t n) -> Term<T> {
      return {p.from + b * p.stride_batch + n * p.stride_token, p.weight ? p.weight[b * p.tokens + n] : A(1)};
    };
    list_by_output(p, b, first, next);
    // In the order of the input, in which memory is read ahead.
    for (int64_t n = from; n < to; ++n) {
      const int64_t o = assignment[n];
      if (kept[o] != n) continue;
      T* row = p.to + (b * p.outputs + o) * p.channels;
      int64_t count = 0;
      terms[count++] = term(n);
      for (int64_t k = first[o]; k >= 0; k = next[k]) terms[count++] = term(k);
      if (count == 1 && terms[0].weight == 1) {
        copy_row<STREAMED>(terms[0].row, p.channels, row);
      } else {
        sum_rows<STREAMED>(terms, count, p.channels, row);
      }
    }
  }
  if (STREAMED) fence();
}

template <typename T>
static void combine_rows(const MergeRows<T>& p, int64_t begin, int64_t end) {
  if (p.channels == 0) return;  // such rows have no address that memcpy takes
  p.streamed(p.outputs) ? combine_as<true>(p, begin, end) : combine_as<false>(p, begin, end);
}

template <bool STREAMED, typename T, typename A = Accumulate<T>>
static void unmerge_as(const MergeRows<T>& p, int64_t begin, int64_t end) {
  const int64_t block = p.block(), blocks = p.blocks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, first = task % blocks * block;
    const int64_t last = first + block < p.tokens ? first + block : p.tokens;
    for (int64_t n = first; n < last; ++n) {
      const int64_t row = b * p.tokens + n;
      const T* from = p.from + b * p.stride_batch + p.assignment[row] * p.stride_token;
      T* to = p.to + row * p.channels;
      const A weight = p.weight ? p.weight[row] : A(1);
      if (p.lost(b, n)) {
        std::memset(static_cast<void*>(to), 0, size_t(p.channels) * sizeof(T));
      } else if (weight == 1) {
        copy_row<STREAMED>(from, p.channels, to);
      } else {
        scale_row<STREAMED>(from, weight, p.channels, to);
      }
    }
  }
  if (STREAMED) fence();
}

template <typename T>
static void unmerge_rows(const MergeRows<T>& p, int64_t begin, int64_t end) {
  if (p.channels == 0) return;  // such rows have no address that memcpy takes
  p.streamed(p.tokens) ? unmerge_as<true>(p, begin, end) : unmerge_as<false>(p, begin, end);
}

#else

MLIP_DEFINE_DISPATCH(combine_rows, MergeRows)
MLIP_DEFINE_DISPATCH(unmerge_rows, MergeRows)

namespace mlip::cpu {
namespace {

constexpr const char* ASSIGNMENT_FAULT = "assignment: expected rows of the output, from 0 to N' - 1";

// Whether all of `rows` are in [0, limit): the sign of neither difference is set. Without a branch, it takes vectors.
bool inside(const int64_t* rows, int64_t count, int64_t limit) {
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) signs |= uint64_t(rows[i]) | (uint64_t(limit - 1) - uint64_t(rows[i]));
  return signs >> 63 == 0;
}

}  // namespace

const char* merge_fault(const RowIndices& p, int64_t begin, int64_t end) {
  const int64_t merged = p.tokens - p.outputs;
  Scratch memory(size_t(p.tokens), false);
  auto* named = memory.as<unsigned char>();
  for (int64_t b = begin; b < end; ++b) {
    const int64_t *kept = p.kept + b * p.outputs, *removed = p.removed + b * merged;
    const int64_t* assignment = p.assignment + b * p.tokens;
    if (!inside(assignment, p.tokens, p.outputs)) return ASSIGNMENT_FAULT;
    if (!inside(kept, p.outputs, p.tokens)) return "kept: expected rows of the input, from 0 to N - 1";
    if (!inside(removed, merged, p.tokens)) return "removed: expected rows of the input, from 0 to N - 1";
    std::memset(named, 0, size_t(p.tokens));
    int64_t apart = 0;
    for (int64_t o = 0; o < p.outputs; ++o) named[kept[o]] = 1, apart |= assignment[kept[o]] ^ o;
    for (int64_t k = 0; k < merged; ++k) named[removed[k]] = 1;
    if (apart != 0) return "assignment, kept: expected assignment[kept[o]] = o for every output row o";
    if (std::memchr(named, 0, size_t(p.tokens)) != nullptr) {
      return "kept, removed: expected every row of the input in one of them, once";
    }
  }
  return nullptr;
}

const char* unmerge_fault(const RowIndices& p, int64_t begin, int64_t end) {
  const int64_t block = p.block(), blocks = p.blocks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * block, rows = p.tokens - first < block ? p.tokens - first : block;
    if (!inside(p.assignment + task / blocks * p.tokens + first, rows, p.outputs)) return ASSIGNMENT_FAULT;
  }
  return nullptr;
}

template <typename A>
void merge_weights(const RowIndices& p, const float* sizes, float* merged_size, A* weights, int64_t begin,
                   int64_t end) {
  const int64_t merged = p.tokens - p.outputs;
  const auto size = [&](int64_t b, int64_t n) { return sizes ? sizes[b * p.tokens + n] : 1.0f; };
  for (int64_t b = begin; b < end; ++b) {
    const int64_t *kept = p.kept + b * p.outputs, *removed = p.removed + b * merged;
    const int64_t* assignment = p.assignment + b * p.tokens;
    float* total = merged_size + b * p.outputs;
    A* weight = weights + b * p.tokens;
    const auto counted = [&](int64_t o) { return p.mask && !p.mask[b * p.outputs + o] ? 0.0f : size(b, kept[o]); };
    for (int64_t o = 0; o < p.outputs; ++o) total[o] = counted(o);
    for (int64_t k = 0; k < merged; ++k) {
      if (!p.lost(b, removed[k])) total[assignment[removed[k]]] += size(b, removed[k]);
    }
    for (int64_t o = 0; o < p.outputs; ++o) weight[kept[o]] = total[o] > 0 ? A(counted(o)) / A(total[o]) : A(1);
    for (int64_t k = 0; k < merged; ++k) {
      const int64_t n = removed[k];
      const float sum = total[assignment[n]];
      weight[n] = (p.lost(b, n) ? A(0) : A(size(b, n))) / (sum > 0 ? A(sum) : A(1));
    }
  }
}

template void merge_weights<float>(const RowIndices&, const float*, float*, float*, int64_t, int64_t);
template void merge_weights<double>(const RowIndices&, const float*, float*, double*, int64_t, int64_t);

}  // namespace mlip::cpu

#endif  // MLIP_VECTOR_BYTES
