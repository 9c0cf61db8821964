// Applies Fourier lines of compiled lengths; declared in cpu/spectral/fourier_line_kernels.h. Compiled once per
// instruction set that has registers enough, by cpu/spectral/fourier_line_short.cpp.
#include "cpu/spectral/lines_kernels.h"
//
#include "cpu/spectral/fourier_line_kernels.h"

#if MLIP_VECTOR_BYTES > 16 || !MLIP_X86

#include "cpu/spectral/lines_short.h"

// Sines, from the last place downwards.
template <int N, class To>
struct ToSines {
  const To& to;
  template <class V>
  inline __attribute__((always_inline)) void operator()(int i, V value) const {
    to(N - 1 - i, value);
  }
};

// Where the sine part meets the cosine part of a mirrored pair of outputs.
template <int N, typename A, class To>
struct ToPairs {
  const Vector<A> (&cosine)[N / 2 + 1];
  const To& to;
  inline __attribute__((always_inline)) void operator()(int i, Vector<A> sine) const {
    to(i + 1, cosine[i + 1] + sine);
    to(N - 1 - i, cosine[i + 1] - sine);
  }
};

template <int N, bool TRANSPOSED, typename A>
static inline __attribute__((always_inline)) void fourier_vector(const A* tree, const A* x, int64_t stride_x, A* y,
                                                                 int64_t stride_y) {
  using Cosines = typename FourierCosineTree<N>::type;
  using Sines = typename FourierSineTree<N>::type;
  const ToMemory<A> to{y, stride_y};
  Vector<A> cosine[N / 2 + 1], sine[(N - 1) / 2];
  cosine[0] = load(x);
  if constexpr (N % 2 == 0) cosine[N / 2] = load(x + N / 2 * stride_x);
  if constexpr (TRANSPOSED) {
    MLIP_UNROLL_ALL
    for (int k = 1; k < (N + 1) / 2; ++k) {
      cosine[k] = load(x + k * stride_x);
      sine[k - 1] = load(x + (N - k) * stride_x);
    }
    Vector<A> cosines[N / 2 + 1];
    Apply<A, Cosines>::transposed(cosine, tree, ToArray<A, N / 2 + 1>{cosines});
    Apply<A, Sines>::transposed(sine, tree + Cosines::COEFFICIENTS, ToPairs<N, A, ToMemory<A>>{cosines, to});
    to(0, cosines[0]);
    if constexpr (N % 2 == 0) to(N / 2, cosines[N / 2]);
  } else {
    MLIP_UNROLL_ALL
    for (int n = 1; n < (N + 1) / 2; ++n) {
      const Vector<A> a = load(x + n * stride_x), b = load(x + (N - n) * stride_x);
      cosine[n] = a + b;
      sine[n - 1] = a - b;
    }
    Apply<A, Sines>::plain(sine, tree + Cosines::COEFFICIENTS, ToSines<N, ToMemory<A>>{to});
    Apply<A, Cosines>::plain(cosine, tree, to);
  }
}

template <int N, bool TRANSPOSED>
static void fourier_vectors(const float* tree, const float* x, int64_t stride_x, float* y, int64_t stride_y,
                            int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v, x += LANES<float>, y += LANES<float>) {
    fourier_vector<N, TRANSPOSED>(tree, x, stride_x, y, stride_y);
  }
}

template <bool TRANSPOSED>
void fourier_short(const FourierLine<float>& line, const float* x, int64_t stride_x, float* y, int64_t stride_y,
                   int64_t vectors) {
  const float* tree = TRANSPOSED ? line.tree_transposed : line.tree;
  switch (line.length) {
#define MLIP_FOURIER(N)                                                      \
  case N:                                                                    \
    fourier_vectors<N, TRANSPOSED>(tree, x, stride_x, y, stride_y, vectors); \
    break;
    MLIP_LENGTHS(MLIP_FOURIER)
#undef MLIP_FOURIER
  }
}
template void fourier_short<false>(const FourierLine<float>&, const float*, int64_t, float*, int64_t, int64_t);
template void fourier_short<true>(const FourierLine<float>&, const float*, int64_t, float*, int64_t, int64_t);

#undef MLIP_UNROLL_ALL
#endif
