// Applies trees (cpu/spectral/trees.h), maps whose length is known at compile time: every input stays in a register.
// Included by the files that compile a family of them.

#define MLIP_UNROLL_ALL _Pragma("GCC unroll 32")

// Receivers of outputs: to(index, value).

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

  template <class To>
  static inline __attribute__((always_inline)) void plain(const Vector<A> (&x)[N], const A* c, const To& to) {
    Vector<A> sums[Even::SIZE], differences[Odd::SIZE];
    MLIP_UNROLL_ALL
    for (int n = 0; n < Odd::SIZE; ++n) {
      sums[n] = x[n] + x[N - 1 - n];
      differences[n] = x[n] - x[N - 1 - n];
    }
    if constexpr (N % 2) sums[N / 2] = x[N / 2];
    Apply<A, Odd>::plain(differences, c + Even::COEFFICIENTS, ToEverySecond<A, 1, To>{to});
    Apply<A, Even>::plain(sums, c, ToEverySecond<A, 0, To>{to});
  }

  template <class To>
  static inline __attribute__((always_inline)) void transposed(const Vector<A> (&x)[N], const A* c, const To& to) {
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
