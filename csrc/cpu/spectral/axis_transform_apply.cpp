// Applies an AxisTransform (cpu/spectral/axis_transform.h) to vectors of channels: by its factors, or unrolled.
#include "cpu/spectral/axis_transform.h"

#define MLIP_KERNELS "cpu/spectral/axis_transform_apply.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

// By factors, any length.

#define MLIP_UNROLL _Pragma("GCC unroll 8")

// Most vectors of channels that are computed together, given 32 or 16 registers.
constexpr int WIDEST = MLIP_VECTOR_BYTES == 64 ? 4 : 2;

// Terms that are added one by one; longer sums are sums of such sums, which round less.
constexpr int64_t SEGMENT = 64;

// R rows of a block times V vectors: from[n] holds V vectors for each column.
template <int R, int V, typename A>
static inline __attribute__((always_inline)) void panel(const A* coefficients, int64_t columns, const A* from,
                                                        Vector<A> (&sums)[R][V]) {
  MLIP_UNROLL
  for (int r = 0; r < R; ++r) {
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Vector<A>{};
  }
  for (int64_t n = 0; n < columns; ++n) {
    Vector<A> x[V];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load(from + (n * V + v) * LANES<A>);
    MLIP_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vector<A> c = broadcast(coefficients[n * R + r]);
      MLIP_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += c * x[v];
    }
  }
}

template <int R, int V, bool DIRECT, typename A>
static void panel_to(const A* coefficients, int64_t columns, const A* from,
                     const typename AxisTransform<A>::Single* targets, const Strided<A>& y, A* to) {
  Vector<A> sums[R][V];
  panel<R, V, A>(coefficients, columns < SEGMENT ? columns : SEGMENT, from, sums);
  for (int64_t n = SEGMENT; n < columns; n += SEGMENT) {
    const int64_t count = columns - n < SEGMENT ? columns - n : SEGMENT;
    Vector<A> segment[R][V];
    panel<R, V, A>(coefficients + n * R, count, from + n * V * LANES<A>, segment);
    MLIP_UNROLL
    for (int r = 0; r < R; ++r) {
      MLIP_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += segment[r][v];
    }
  }
  MLIP_UNROLL
  for (int r = 0; r < R; ++r) {
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      if constexpr (DIRECT) {
        store(y[targets[r].index] + v * LANES<A>, sums[r][v]);
      } else {
        store(to + (r * V + v) * LANES<A>, sums[r][v]);
      }
    }
  }
}

// Output slots in `to`, or the outputs themselves in y.
template <int V, bool DIRECT, typename A>
static __attribute__((noinline)) void blocks(const AxisTransform<A>& axis, const A* from, const Strided<A>& y, A* to) {
  constexpr int PANEL = AxisTransform<A>::PANEL;
  for (const auto& block : axis.blocks) {
    const int64_t panels = (block.rows + PANEL - 1) / PANEL;
    const A* coefficients = block.coefficients;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = i * block.rows / panels, rows = (i + 1) * block.rows / panels - first;
      const A* in = from + int64_t(block.column) * V * LANES<A>;
      A* out = to + (block.row + first) * V * LANES<A>;
      const auto* targets = axis.output_singles.items + block.row + first;
      switch (rows) {
#define MLIP_PANEL(R)                                                         \
  case R:                                                                     \
    panel_to<R, V, DIRECT>(coefficients, block.columns, in, targets, y, out); \
    break;
        MLIP_PANEL(1)
        MLIP_PANEL(2)
        MLIP_PANEL(3)
        MLIP_PANEL(4)
        MLIP_PANEL(5)
        MLIP_PANEL(6)
#undef MLIP_PANEL
      }
      coefficients += rows * block.columns;
    }
  }
}

template <int V, typename A>
static void add_pairs(const typename AxisTransform<A>::template List<typename AxisTransform<A>::Pair>& pairs,
                      A* slots) {
  for (const auto& pair : pairs) {
    A *to_a = slots + int64_t(pair.a) * V * LANES<A>, *to_b = slots + int64_t(pair.b) * V * LANES<A>;
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector<A> a = load(to_a + v * LANES<A>), b = load(to_b + v * LANES<A>);
      store(to_a + v * LANES<A>, a + b);
      store(to_b + v * LANES<A>, a - b);
    }
  }
}

// Inputs into their slots.
template <int V, typename In, typename A>
static __attribute__((noinline)) void gather(const AxisTransform<A>& axis, const Strided<const In>& x, A* slots) {
  for (const auto& fold : axis.input_folds) {
    const In *first = x[fold.first], *second = x[fold.second];
    A* to_a = slots + int64_t(fold.slots.a) * V * LANES<A>;
    A* to_b = slots + int64_t(fold.slots.b) * V * LANES<A>;
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector<A> a = load(first + v * LANES<A>), b = load(second + v * LANES<A>);
      store(to_a + v * LANES<A>, a + b);
      store(to_b + v * LANES<A>, a - b);
    }
  }
  for (const auto& single : axis.input_singles) {
    const In* from = x[single.index];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) store(slots + (int64_t(single.slot) * V + v) * LANES<A>, load(from + v * LANES<A>));
  }
}

// Outputs from their slots.
template <int V, typename Out, typename A>
static __attribute__((noinline)) void scatter(const AxisTransform<A>& axis, const A* slots, const Strided<Out>& y) {
  for (const auto& fold : axis.output_folds) {
    const A* from_a = slots + int64_t(fold.slots.a) * V * LANES<A>;
    const A* from_b = slots + int64_t(fold.slots.b) * V * LANES<A>;
    Out *first = y[fold.first], *second = y[fold.second];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector<A> a = load(from_a + v * LANES<A>), b = load(from_b + v * LANES<A>);
      store(first + v * LANES<A>, a + b);
      store(second + v * LANES<A>, a - b);
    }
  }
  for (const auto& single : axis.output_singles) {
    Out* to = y[single.index];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) store(to + v * LANES<A>, load(slots + (int64_t(single.slot) * V + v) * LANES<A>));
  }
}

// Outputs that need no sums and no other type are stored by the blocks.
template <int V, typename A>
static bool blocks_to(const AxisTransform<A>& axis, const A* in, const Strided<A>& y) {
  if (axis.output_folds.count || axis.output_pairs.count) return false;
  blocks<V, true, A>(axis, in, y, nullptr);
  return true;
}
template <int V, typename A, typename Out>
static bool blocks_to(const AxisTransform<A>&, const A*, const Strided<Out>&) {
  return false;
}

// The transform by its factors, for V vectors of channels.
template <int V, typename In, typename Out, typename A>
static void apply_factors(const AxisTransform<A>& axis, const Strided<const In>& x, const Strided<Out>& y, A* scratch) {
  A *in = scratch, *out = scratch + axis.inputs * V * LANES<A>;
  gather<V, In, A>(axis, x, in);
  add_pairs<V, A>(axis.input_pairs, in);
  if (blocks_to<V>(axis, in, y)) return;
  blocks<V, false, A>(axis, in, {}, out);
  add_pairs<V, A>(axis.output_pairs, out);
  scatter<V, Out, A>(axis, out, y);
}

// Whether unrolled code is compiled: for float, given registers enough (`has_unrolled` decides at run time).
template <typename A>
constexpr bool UNROLLED = std::is_same_v<A, float> && (MLIP_VECTOR_BYTES > 16 || !MLIP_X86);

#if MLIP_VECTOR_BYTES > 16 || !MLIP_X86
#define MLIP_UNROLL_ALL _Pragma("GCC unroll 32")

// Receivers of outputs, called as to(index, value), and inputs in memory.

template <typename A>
struct ToMemory {
  A* y;
  int64_t stride;
  inline __attribute__((always_inline)) void operator()(int i, Vector<A> value) const { store(y + i * stride, value); }
};

template <typename A, int N>
struct ToArray {
  Vector<A> (&to)[N];
  inline __attribute__((always_inline)) void operator()(int i, Vector<A> value) const { to[i] = value; }
};

template <typename A, int FIRST, class To>
struct ToEverySecond {
  const To& to;
  inline __attribute__((always_inline)) void operator()(int i, Vector<A> value) const { to(2 * i + FIRST, value); }
};

// Odd parts of outputs, which meet the even parts here.
template <typename A, int N, class To>
struct ToMirrored {
  const Vector<A> (&even)[(N + 1) / 2];
  const To& to;
  inline __attribute__((always_inline)) void operator()(int i, Vector<A> odd) const {
    to(i, even[i] + odd);
    to(N - 1 - i, even[i] - odd);
  }
};

template <typename A>
struct FromMemory {
  const A* x;
  int64_t stride;
  inline __attribute__((always_inline)) Vector<A> operator[](int i) const { return load(x + i * stride); }
};

// Multiplies by the matrix of a tree: inputs are x[0] .. x[SIZE - 1].
template <typename A, class Tree>
struct Apply;

template <typename A, int N>
struct Apply<A, Dense<N>> {
  // Rows are computed R at a time: a sum waits for its last addition, four sums need not.
  template <int R, class To>
  static inline __attribute__((always_inline)) void rows(int first, const Vector<A> (&x)[N], const A* c, const To& to) {
    Vector<A> sums[R];
    MLIP_UNROLL_ALL
    for (int r = 0; r < R; ++r) sums[r] = broadcast(c[(first + r) * N]) * x[0];
    MLIP_UNROLL_ALL
    for (int n = 1; n < N; ++n) {
      MLIP_UNROLL_ALL
      for (int r = 0; r < R; ++r) sums[r] += broadcast(c[(first + r) * N + n]) * x[n];
    }
    MLIP_UNROLL_ALL
    for (int r = 0; r < R; ++r) to(first + r, sums[r]);
  }

  template <class To>
  static inline __attribute__((always_inline)) void plain(const Vector<A> (&x)[N], const A* c, const To& to) {
    MLIP_UNROLL_ALL
    for (int k = 0; k + 4 <= N; k += 4) rows<4>(k, x, c, to);
    if constexpr (N % 4) rows<N % 4>(N - N % 4, x, c, to);
  }

  template <class To>
  static inline __attribute__((always_inline)) void transposed(const Vector<A> (&x)[N], const A* c, const To& to) {
    plain(x, c, to);
  }
};

template <typename A, class Even, class Odd>
struct Apply<A, Fold<Even, Odd>> {
  static constexpr int N = Even::SIZE + Odd::SIZE;

  template <class In, class To>
  static inline __attribute__((always_inline)) void plain(const In& x, const A* c, const To& to) {
    Vector<A> sums[Even::SIZE], differences[Odd::SIZE];
    MLIP_UNROLL_ALL
    for (int n = 0; n < Odd::SIZE; ++n) {
      const Vector<A> a = x[n], b = x[N - 1 - n];
      sums[n] = a + b;
      differences[n] = a - b;
    }
    if constexpr (N % 2) sums[N / 2] = x[N / 2];
    Apply<A, Odd>::plain(differences, c + Even::COEFFICIENTS, ToEverySecond<A, 1, To>{to});
    Apply<A, Even>::plain(sums, c, ToEverySecond<A, 0, To>{to});
  }

  template <class In, class To>
  static inline __attribute__((always_inline)) void transposed(const In& x, const A* c, const To& to) {
    Vector<A> even_in[Even::SIZE], odd_in[Odd::SIZE], even[Even::SIZE];
    MLIP_UNROLL_ALL
    for (int n = 0; n < Even::SIZE; ++n) even_in[n] = x[2 * n];
    MLIP_UNROLL_ALL
    for (int n = 0; n < Odd::SIZE; ++n) odd_in[n] = x[2 * n + 1];
    Apply<A, Even>::transposed(even_in, c, ToArray<A, Even::SIZE>{even});
    Apply<A, Odd>::transposed(odd_in, c + Even::COEFFICIENTS, ToMirrored<A, N, To>{even, to});
    if constexpr (N % 2) to(N / 2, even[N / 2]);
  }
};

// Sines, from the last output downwards.
template <int N, class To>
struct ToSines {
  const To& to;
  template <class V>
  inline __attribute__((always_inline)) void operator()(int i, V value) const {
    to(N - 1 - i, value);
  }
};

// Sine parts of mirrored pairs of outputs, which meet their cosine parts here.
template <int N, typename A, class To>
struct ToPairs {
  const Vector<A> (&cosine)[N / 2 + 1];
  const To& to;
  inline __attribute__((always_inline)) void operator()(int i, Vector<A> sine) const {
    to(i + 1, cosine[i + 1] + sine);
    to(N - 1 - i, cosine[i + 1] - sine);
  }
};

template <typename A, int N>
struct Apply<A, RealFourier<N>> {
  using Cosines = typename RealFourier<N>::Cosines;
  using Sines = typename RealFourier<N>::Sines;

  template <class In, class To>
  static inline __attribute__((always_inline)) void plain(const In& x, const A* c, const To& to) {
    Vector<A> cosine[N / 2 + 1], sine[(N - 1) / 2];
    cosine[0] = x[0];
    if constexpr (N % 2 == 0) cosine[N / 2] = x[N / 2];
    MLIP_UNROLL_ALL
    for (int n = 1; n < (N + 1) / 2; ++n) {
      const Vector<A> a = x[n], b = x[N - n];
      cosine[n] = a + b;
      sine[n - 1] = a - b;
    }
    Apply<A, Sines>::plain(sine, c + Cosines::COEFFICIENTS, ToSines<N, To>{to});
    Apply<A, Cosines>::plain(cosine, c, to);
  }

  template <class In, class To>
  static inline __attribute__((always_inline)) void transposed(const In& x, const A* c, const To& to) {
    Vector<A> cosine_in[N / 2 + 1], sine_in[(N - 1) / 2], cosine[N / 2 + 1];
    cosine_in[0] = x[0];
    if constexpr (N % 2 == 0) cosine_in[N / 2] = x[N / 2];
    MLIP_UNROLL_ALL
    for (int k = 1; k < (N + 1) / 2; ++k) {
      cosine_in[k] = x[k];
      sine_in[k - 1] = x[N - k];
    }
    Apply<A, Cosines>::transposed(cosine_in, c, ToArray<A, N / 2 + 1>{cosine});
    Apply<A, Sines>::transposed(sine_in, c + Cosines::COEFFICIENTS, ToPairs<N, A, To>{cosine, to});
    to(0, cosine[0]);
    if constexpr (N % 2 == 0) to(N / 2, cosine[N / 2]);
  }
};

template <class Tree, bool TRANSPOSED>
static __attribute__((noinline)) void apply_tree(const float* tree, const float* x, int64_t stride_x, float* y,
                                                 int64_t stride_y, int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v, x += LANES<float>, y += LANES<float>) {
    const FromMemory<float> from{x, stride_x};
    const ToMemory<float> to{y, stride_y};
    if constexpr (TRANSPOSED) {
      Apply<float, Tree>::transposed(from, tree, to);
    } else {
      Apply<float, Tree>::plain(from, tree, to);
    }
  }
}

static __attribute__((noinline)) void apply_unrolled(const AxisTransform<float>& axis, const Strided<const float>& x,
                                                     const Strided<float>& y, int64_t vectors) {
  switch (axis.inputs) {
#define MLIP_APPLY(KIND, TREE, TRANSPOSED) \
  case Unrolled::KIND:                     \
    return apply_tree<TREE, TRANSPOSED>(axis.tree, x.first, x.stride, y.first, y.stride, vectors);
#define MLIP_APPLY_LENGTH(N)                               \
  case N:                                                  \
    switch (axis.unrolled) {                               \
      MLIP_APPLY(cosine, Cosine<N>, false)                 \
      MLIP_APPLY(cosine_transposed, Cosine<N>, true)       \
      MLIP_APPLY(fourier, RealFourier<N>, false)           \
      MLIP_APPLY(fourier_transposed, RealFourier<N>, true) \
      default:                                             \
        return;                                            \
    }
    MLIP_UNROLLED_LENGTHS(MLIP_APPLY_LENGTH)
#undef MLIP_APPLY_LENGTH
#undef MLIP_APPLY
  }
}

#undef MLIP_UNROLL_ALL

// Unrolled code takes float to float at one stride; all else passes through a scratch that stays in the first level
// cache. Inputs and outputs share it, as all inputs of a vector are read before its first output is written.
template <typename In, typename Out>
static void transform_unrolled(const AxisTransform<float>& axis, const Strided<const In>& x, const Strided<Out>& y,
                               int64_t vectors, float* scratch) {
  const int64_t point = vectors * LANES<float>;
  Strided<const float> from{scratch, point};
  Strided<float> to{scratch, point};
  if constexpr (std::is_same_v<In, float>) from = x.second ? from : x;
  if constexpr (std::is_same_v<Out, float>) to = y.second ? to : y;
  if (from.first == scratch) {
    for (int64_t n = 0; n < axis.inputs; ++n) {
      for (int64_t d = 0; d < point; d += LANES<float>) store(scratch + n * point + d, load(x[n] + d));
    }
  }
  apply_unrolled(axis, from, to, vectors);
  if (to.first == scratch) {
    for (int64_t m = 0; m < axis.outputs; ++m) {
      for (int64_t d = 0; d < point; d += LANES<float>) store(y[m] + d, load(scratch + m * point + d));
    }
  }
}
#endif

template <typename In, typename Out, typename A>
void transform(const AxisTransform<A>& axis, Strided<const In> x, Strided<Out> y, int64_t vectors, A* scratch) {
  if constexpr (UNROLLED<A>) {
    if (axis.unrolled != Unrolled::no) return transform_unrolled(axis, x, y, vectors, scratch);
  }
  const auto advance = [&](int count) {
    x.first += count * LANES<A>, y.first += count * LANES<A>, vectors -= count;
    if (x.second) x.second += count * LANES<A>;
    if (y.second) y.second += count * LANES<A>;
  };
  for (; vectors >= WIDEST; advance(WIDEST)) apply_factors<WIDEST>(axis, x, y, scratch);
  if (WIDEST > 2 && vectors >= 2) apply_factors<2>(axis, x, y, scratch), advance(2);
  if (vectors > 0) apply_factors<1>(axis, x, y, scratch);
}

#define MLIP_TRANSFORM(In, Out, A) \
  template void transform<In, Out, A>(const AxisTransform<A>&, Strided<const In>, Strided<Out>, int64_t, A*)
MLIP_TRANSFORM(float, float, float);
MLIP_TRANSFORM(double, double, double);
MLIP_TRANSFORM(BFloat16, float, float);
MLIP_TRANSFORM(float, BFloat16, float);
MLIP_TRANSFORM(BFloat16, BFloat16, float);
MLIP_TRANSFORM(Half, float, float);
MLIP_TRANSFORM(float, Half, float);
MLIP_TRANSFORM(Half, Half, float);
#undef MLIP_TRANSFORM
#undef MLIP_UNROLL

#endif  // MLIP_VECTOR_BYTES
