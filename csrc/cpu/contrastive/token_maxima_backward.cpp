// Backward pass of token logits. What it computes and how the work is split: cpu/contrastive/token_maxima.h.
#include <algorithm>
#include <cstring>

#include "cpu/contrastive/token_maxima.h"

#ifndef MLIP_VECTOR_BYTES  // types that all variants share
namespace mlip::cpu {

// One coefficient times one token of the other side: `row` counts tokens from the first of the block.
template <typename A>
struct Term {
  A coefficient;
  int32_t row;
};

// The terms of one destination.
struct TermRange {
  int32_t begin, end;
};

// How the work of the backward pass is cut, and the memory that one thread lists terms in.
template <typename A>
struct TermLists {
  int64_t others;           // of the other side in a block: a slice of their tokens fits the second-level cache
  int64_t members;          // b at a time, which read a block before the next one takes its place
  int64_t terms_of_member;  // at most, in a block
  Term<A>* terms;           // [members, terms_of_member]
  TermRange* ranges;        // [members, N]
  int32_t* argmax;          // [others, N + M]: both argmax of a block
  int32_t* next;            // [N]: where the next term of a destination goes
  A* back;                  // [M + 1] of a pair: coefficients of the M tokens, and 0
};

// The memory that one thread sums in.
template <typename T>
struct TermSums {
  Accumulate<T>* sums;  // [slices, members, N, SLICE], if there is more than one block
  T* slice;             // [others * M + 1, SLICE], the last row is 0: further apart, rows would share few places in the
                        // cache
};

}  // namespace mlip::cpu
#endif

#define MLIP_KERNELS "cpu/contrastive/token_maxima_backward.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

// A row of an argmax, `count` indices in [0, most): what no forward pass has written must not lead outside of the
// tensors.
template <typename I>
static void read_argmax_as(const I* from, int64_t count, int64_t most, int32_t* to) {
  const uint32_t last = uint32_t(most - 1);
  for (int64_t i = 0; i < count; ++i) to[i] = int32_t(uint32_t(from[i]) < last ? uint32_t(from[i]) : last);
}

static void read_argmax(const ArgmaxIndices& argmax, int64_t b, int64_t c, int64_t count, int64_t most, int32_t* to) {
  const int64_t from = b * argmax.stride_b + c * argmax.stride_c;
  if (argmax.bytes == 1) {
    read_argmax_as(static_cast<const uint8_t*>(argmax.values) + from, count, most, to);
  } else if (argmax.bytes == 2) {
    read_argmax_as(static_cast<const int16_t*>(argmax.values) + from, count, most, to);
  } else {
    read_argmax_as(static_cast<const int32_t*>(argmax.values) + from, count, most, to);
  }
}

// The terms of one b with the others first <= c < last, in one list per destination: one for every c, that of its
// argmax, then those of the tokens whose argmax it is. Two tokens that are each other's argmax make one term, of the
// first kind.
//
// Which tokens these are is as good as random, so nothing branches on it: what is no term is listed, too, and the next
// one takes its place. That is why every list has room for one more.
template <bool MASKED, typename A>
static void list_terms(const TokenMaximaGradients<A>& p, const TermLists<A>& lists, int64_t b, int64_t first,
                       int64_t last, Term<A>* terms, TermRange* ranges) {
  const int32_t n = int32_t(p.count), m = int32_t(p.other_count);
  const A* weight = p.normalized_weight + b * n;
  const auto valid = [&](const Flag* mask, int64_t of, int32_t count, int32_t token) {
    return int32_t(!MASKED || mask == nullptr || mask[of * count + token]);
  };
  int32_t* next = lists.next;
  const int32_t others = int32_t(last - first);
  for (int32_t i = 0; i < n; ++i) next[i] = 0;
  for (int64_t c = first; c < last; ++c) {
    int32_t *argmax_other = lists.argmax + (c - first) * (n + m), *argmax = argmax_other + n;
    read_argmax(p.argmax_other, b, c, n, m, argmax_other);
    read_argmax(p.argmax, b, c, m, n, argmax);
    for (int32_t k = 0; k < m; ++k) {
      const int32_t i = argmax[k];
      next[i] += int32_t(argmax_other[i] != k) & valid(p.other_mask, c, m, k) & valid(p.mask, b, n, i);
    }
  }
  int32_t total = 0;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t count = next[i];
    ranges[i] = {total, total + others + count};
    if (MASKED && !valid(p.mask, b, n, i)) ranges[i].end = total;
    next[i] = total + others;
    total += others + count + 1;
  }

  const int32_t none = int32_t(lists.others * m);  // a row of zeros
  A* back = lists.back;
  back[m] = 0;
  for (int64_t c = first; c < last; ++c) {
    int32_t *argmax_other = lists.argmax + (c - first) * (n + m), *argmax = argmax_other + n;
    const A own = p.grad_mean[b * p.other_batch + c], other = p.grad_other_mean[c * p.batch + b];
    const A* other_weight = p.other_normalized_weight + c * m;
    const int32_t row = int32_t((c - first) * m);
    for (int32_t k = 0; k < m; ++k) back[k] = other * other_weight[k];
    for (int32_t k = 0; k < m; ++k) {
      const int32_t i = argmax[k], apart = argmax_other[i] != k;
      terms[next[i]] = {back[k], row + k};
      next[i] += apart & valid(p.other_mask, c, m, k) & valid(p.mask, b, n, i);
    }
    Term<A>* to = terms + (c - first);
    for (int32_t i = 0; i < n; ++i) {
      const int32_t k = argmax_other[i], mutual = argmax[k] == i;
      const A coefficient = own * weight[i] + back[m + (k - m) * mutual];
      to[ranges[i].begin] = valid(p.other_mask, c, m, k) ? Term<A>{coefficient, row + k} : Term<A>{0, none};
    }
  }
}

// Two vectors of consecutive channels: of bfloat16 the even ones and the odd ones, which takes two instructions; of
// other types the first half and the second. Sums keep that order until they are stored.
template <typename T>
static inline __attribute__((always_inline)) void load_pair(const T* from, Vector<Accumulate<T>>* pair) {
  pair[0] = load(from);
  pair[1] = load(from + LANES<Accumulate<T>>);
}

template <typename T>
static inline __attribute__((always_inline)) void store_pair(T* to, const Vector<Accumulate<T>>* pair) {
  store(to, pair[0]);
  store(to + LANES<Accumulate<T>>, pair[1]);
}

static inline __attribute__((always_inline)) void load_pair(const BFloat16* from, Vector<float>* pair) {
  Bits32 bits;
  std::memcpy(&bits, from, sizeof bits);
#if MLIP_VECTOR_BYTES > 16
  asm("" : "+v"(bits));  // or each of the two instructions would read memory, which bounds the time
#endif
  pair[0] = (Vector<float>)(bits << 16);
  pair[1] = (Vector<float>)(bits & 0xffff0000u);
}

static inline __attribute__((always_inline)) void store_pair(BFloat16* to, const Vector<float>* pair) {
  Bits32 nearest[2];
  for (int i = 0; i < 2; ++i) {
    const Bits32 bits = (Bits32)pair[i];
    nearest[i] = pair[i] == pair[i] ? bits + 0x7fff + ((bits >> 16) & 1) : Bits32{} + 0x7fc00000u;
  }
  const Bits32 both = (nearest[0] >> 16) | (nearest[1] & 0xffff0000u);
  std::memcpy(to, &both, sizeof both);
}

// Sums that do not wait for each other: as many as the registers hold.
constexpr int CHAINS = MLIP_VECTOR_BYTES == 64 ? 2 : 1;
constexpr int64_t TERMS_OF_RUN = 32 * CHAINS;  // terms added up at a time: sums of sums round less than long ones

// sum += coefficient times token, P pairs of vectors.
template <int P, typename T, typename A = Accumulate<T>>
static inline __attribute__((always_inline)) void add_term(const Term<A>& term, const T* tokens, Vector<A>* sum) {
  const Vector<A> coefficient = broadcast(term.coefficient);
  const T* token = tokens + term.row * TokenMaximaBackward<T>::SLICE;
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    Vector<A> pair[2];
    load_pair(token + 2 * i * LANES<A>, pair);
    sum[2 * i] += coefficient * pair[0];
    sum[2 * i + 1] += coefficient * pair[1];
  }
}

// total += the terms of a list.
template <int P, typename T, typename A = Accumulate<T>>
static inline __attribute__((always_inline)) void add_terms(const Term<A>* begin, const Term<A>* end, const T* tokens,
                                                            Vector<A>* total) {
  while (begin < end) {
    const Term<A>* run_end = end - begin > TERMS_OF_RUN ? begin + TERMS_OF_RUN : end;
    Vector<A> sums[CHAINS][2 * P] = {};
    for (; begin + CHAINS <= run_end; begin += CHAINS) {
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; ++chain) add_term<P>(begin[chain], tokens, sums[chain]);
    }
    for (; begin < run_end; ++begin) add_term<P>(*begin, tokens, sums[0]);
#pragma GCC unroll 16
    for (int v = 0; v < 2 * P; ++v) {
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; ++chain) total[v] += sums[chain][v];
    }
  }
}

// What a block adds to P pairs of vectors of one destination.
template <typename T, typename A = Accumulate<T>>
struct Destination {
  const Term<A>*begin, *end;
  A* sums;
  T* grad;
  bool is_first, is_last;  // block
};

// The sums of a destination begin with the first block, and the last one turns them into the gradient: P pairs of
// vectors from channel d of the slice on, of which `width` channels are there to be written.
template <int P, typename T, typename A = Accumulate<T>>
static inline void add_block(const Destination<T>& to, const T* tokens, int64_t d, int64_t width) {
  constexpr int64_t PAIR = 2 * LANES<A>;
  Vector<A> total[2 * P] = {};
  add_terms<P>(to.begin, to.end, tokens + d, total);
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i, d += PAIR) {
    Vector<A>* pair = total + 2 * i;
    if (!to.is_first) pair[0] += load(to.sums + d), pair[1] += load(to.sums + d + LANES<A>);
    if (!to.is_last) {
      store(to.sums + d, pair[0]), store(to.sums + d + LANES<A>, pair[1]);
    } else if (d + PAIR <= width) {
      store_pair(to.grad + d, pair);
    } else {
      T padded[PAIR];
      store_pair(padded, pair);
      std::memcpy(static_cast<void*>(to.grad + d), padded, size_t(width - d) * sizeof(T));
    }
  }
}

// Channels first <= d < last of `rows` tokens, SLICE apart, with zeros up to `padded` channels.
template <typename T>
static void gather_slice(const T* tokens, int64_t channels, int64_t rows, int64_t first, int64_t last, int64_t padded,
                         T* slice) {
  // Rows lie `channels` apart, of which processors fetch little ahead.
  constexpr int64_t AHEAD = 16, LINE = 64 / sizeof(T);
  const int64_t width = last - first;
  for (int64_t row = 0; row < rows; ++row) {
    T* to = slice + row * TokenMaximaBackward<T>::SLICE;
    const T* ahead = tokens + (row + AHEAD < rows ? row + AHEAD : rows - 1) * channels + first;
    for (int64_t d = 0; d < width; d += LINE) __builtin_prefetch(ahead + d);
    std::memcpy(static_cast<void*>(to), tokens + row * channels + first, size_t(width) * sizeof(T));
    if (width < padded) std::memset(static_cast<void*>(to + width), 0, size_t(padded - width) * sizeof(T));
  }
}

// `members` of b, from b on, and channels first <= d < last, where first is a multiple of SLICE.
template <typename T, typename A = Accumulate<T>>
static void add_members(const TokenMaximaBackward<T>& p, const TermLists<A>& lists, const TermSums<T>& memory,
                        int64_t b, int64_t members, int64_t first, int64_t last) {
  constexpr int64_t PAIR = 2 * LANES<A>, SLICE = p.SLICE, P = 4;
  const int64_t n = p.count, m = p.other_count;
  for (int64_t c = 0; c == 0 || c < p.other_batch; c += lists.others) {  // once even if there are no others
    const int64_t end = c + lists.others < p.other_batch ? c + lists.others : p.other_batch;
    for (int64_t i = 0; i < members; ++i) {
      const auto list = p.mask || p.other_mask ? list_terms<true, A> : list_terms<false, A>;
      list(p, lists, b + i, c, end, lists.terms + i * lists.terms_of_member, lists.ranges + i * n);
    }
    for (int64_t d = first; d < last; d += SLICE) {
      const int64_t width = last - d < SLICE ? last - d : SLICE, padded = (width + PAIR - 1) / PAIR * PAIR;
      gather_slice(p.others + c * m * p.channels, p.channels, (end - c) * m, d, d + width, padded, memory.slice);
      for (int64_t row = 0; row < members * n; ++row) {
        const Term<A>* terms = lists.terms + row / n * lists.terms_of_member;
        const Destination<T> to = {terms + lists.ranges[row].begin,
                                   terms + lists.ranges[row].end,
                                   memory.sums + (d - first) * members * n + row * SLICE,
                                   p.grad + (b * n + row) * p.channels + d,
                                   c == 0,
                                   end == p.other_batch};
        int64_t k = 0;
        for (; k + P * PAIR <= padded; k += P * PAIR) add_block<P>(to, memory.slice, k, width);
        for (; k < padded; k += PAIR) add_block<1>(to, memory.slice, k, width);
      }
    }
  }
}

template <typename T>
static void backward(const TokenMaximaBackward<T>& p, const TermLists<Accumulate<T>>& lists, const TermSums<T>& memory,
                     int64_t begin, int64_t end) {
  const int64_t slices = p.slices();
  while (begin < end) {
    const int64_t b = begin / slices, slice = begin % slices, whole = (end - begin) / slices;
    if (slice == 0 && whole > 0) {
      const int64_t members = whole < lists.members ? whole : lists.members;
      add_members(p, lists, memory, b, members, 0, p.channels);
      begin += members * slices;
    } else {
      const int64_t until = end - begin < slices - slice ? slice + end - begin : slices;
      const int64_t last = until * p.SLICE < p.channels ? until * p.SLICE : p.channels;
      add_members(p, lists, memory, b, 1, slice * p.SLICE, last);
      begin += until - slice;
    }
  }
}

#else

namespace mlip::cpu {
namespace {

// The second-level cache, 1 MiB on many processors, is to hold a slice of the others and some sums; the terms of all
// members pass through it, once per slice.
constexpr int64_t SLICE_BYTES = 384 << 10, TERMS_BYTES = 768 << 10, SUMS_BYTES = 8 << 20, MOST_MEMBERS = 32;

template <typename T>
void run_backward(const TokenMaximaBackward<T>& problem, const TermLists<Accumulate<T>>& lists, const TermSums<T>& sums,
                  int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(backward<T>, problem, lists, sums, begin, end);
}

}  // namespace

template <typename T>
void token_maxima_backward(const TokenMaximaBackward<T>& problem, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t n = problem.count, m = problem.other_count;
  TermLists<A> lists{};
  const int64_t other_bytes = m * problem.SLICE * int64_t(sizeof(T));
  lists.others = std::max(int64_t(1), std::min(SLICE_BYTES / other_bytes, problem.other_batch));
  lists.terms_of_member = lists.others * (n + m) + n;
  const int64_t term_bytes = lists.terms_of_member * int64_t(sizeof(Term<A>));
  const bool keeps_sums = lists.others < problem.other_batch;
  const int64_t sum_bytes = keeps_sums ? n * problem.slices() * problem.SLICE * int64_t(sizeof(A)) : 0;
  lists.members =
      std::min({problem.batch, MOST_MEMBERS, TERMS_BYTES / term_bytes, SUMS_BYTES / std::max(sum_bytes, int64_t(1))});
  lists.members = std::max(lists.members, int64_t(1));

  Scratch term_memory(size_t(lists.members * lists.terms_of_member) * sizeof(Term<A>), false);
  Scratch range_memory(size_t(lists.members * n) * sizeof(TermRange), false);
  Scratch argmax_memory(size_t(lists.others * (n + m)) * sizeof(int32_t), false);
  Scratch next_memory(size_t(n) * sizeof(int32_t), false);
  Scratch back_memory(size_t(m + 1) * sizeof(A), false);
  Scratch sum_memory(size_t(lists.members * sum_bytes), false);
  Scratch slice_memory(size_t((lists.others * m + 1) * problem.SLICE) * sizeof(T), false);
  lists.terms = term_memory.as<Term<A>>();
  lists.ranges = range_memory.as<TermRange>();
  lists.argmax = argmax_memory.as<int32_t>();
  lists.next = next_memory.as<int32_t>();
  lists.back = back_memory.as<A>();
  const TermSums<T> sums = {sum_memory.as<A>(), slice_memory.as<T>()};
  std::memset(static_cast<void*>(sums.slice + lists.others * m * problem.SLICE), 0, size_t(problem.SLICE) * sizeof(T));
  run_backward(problem, lists, sums, begin, end);
}

#define MLIP_INSTANTIATE(T) template void token_maxima_backward<T>(const TokenMaximaBackward<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu

#endif  // MLIP_VECTOR_BYTES
