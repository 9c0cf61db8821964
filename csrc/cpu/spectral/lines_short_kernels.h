// Applies lines of compiled lengths; declared in cpu/spectral/lines_kernels.h. Compiled once per instruction set that
// has registers enough, by cpu/spectral/lines_short.cpp.
#include "cpu/spectral/lines_kernels.h"

#if MLIP_VECTOR_BYTES > 16 || !MLIP_X86

#include "cpu/spectral/lines_short.h"

template <int N, bool TRANSPOSED>
static void cosine(const float* coefficients, const float* x, int64_t stride_x, float* y, int64_t stride_y,
                   int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v, x += LANES<float>, y += LANES<float>) {
    const ToMemory<float> to{y, stride_y};
    Vector<float> inputs[N];
    MLIP_UNROLL_ALL
    for (int n = 0; n < N; ++n) inputs[n] = load(x + n * stride_x);
    if constexpr (TRANSPOSED) {
      Apply<float, Cosine<N>>::transposed(inputs, coefficients, to);
    } else {
      Apply<float, Cosine<N>>::plain(inputs, coefficients, to);
    }
  }
}

void transform_short(const Line<float>& line, const float* x, int64_t stride_x, float* y, int64_t stride_y,
                     int64_t vectors) {
  switch (line.inputs) {
#define MLIP_TRANSFORM(N)                                                              \
  case N:                                                                              \
    if (line.compiled == Compiled::cosine) {                                           \
      cosine<N, false>(line.compiled_coefficients, x, stride_x, y, stride_y, vectors); \
    } else {                                                                           \
      cosine<N, true>(line.compiled_coefficients, x, stride_x, y, stride_y, vectors);  \
    }                                                                                  \
    break;
    MLIP_LENGTHS(MLIP_TRANSFORM)
#undef MLIP_TRANSFORM
  }
}

#undef MLIP_UNROLL_ALL
#endif
