// Compiled once per instruction set (cpu/simd.h). What it computes and how the work is split: cpu/merging/merge.h.

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
template <typename T>
static void list_by_output(const MergeRows<T>& p, int64_t b, int64_t* first, int64_t* next) {
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
      return {p.from + b * p.stride_batch + n * p.stride_token,
              p.known_weight ? p.known_weight[b * p.tokens + n] : A(1)};
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
static void combine(const MergeRows<T>& p, int64_t begin, int64_t end) {
  p.streamed(p.outputs) ? combine_as<true>(p, begin, end) : combine_as<false>(p, begin, end);
}

template <bool STREAMED, typename T, typename A = Accumulate<T>>
static void spread_as(const MergeRows<T>& p, int64_t begin, int64_t end) {
  const int64_t block = p.block(), blocks = p.blocks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, first = task % blocks * block;
    const int64_t last = first + block < p.tokens ? first + block : p.tokens;
    for (int64_t n = first; n < last; ++n) {
      const int64_t row = b * p.tokens + n;
      const T* from = p.from + b * p.stride_batch + p.assignment[row] * p.stride_token;
      T* to = p.to + row * p.channels;
      const A weight = p.known_weight ? p.known_weight[row] : A(1);
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
static void spread(const MergeRows<T>& p, int64_t begin, int64_t end) {
  p.streamed(p.tokens) ? spread_as<true>(p, begin, end) : spread_as<false>(p, begin, end);
}
