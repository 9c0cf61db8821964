// Applies a FourierLine (cpu/spectral/fourier_line.h); declared in cpu/spectral/fourier_line_kernels.h. Compiled once
// per instruction set, by cpu/spectral/fourier_line_apply.cpp.
#include "cpu/spectral/lines_kernels.h"
//
#include "cpu/spectral/fourier_line_kernels.h"

// Float to float only; other types pass by a scratch that stays in the first level cache.
template <bool TRANSPOSED, typename In, typename Out>
static void fourier_compiled(const FourierLine<float>& line, const In* x, int64_t stride_x, Out* y, int64_t stride_y,
                             int64_t vectors, float* scratch) {
  const Widened in = widened(x, stride_x, line.length, vectors, scratch);
  const Unnarrowed<Out> out(y, stride_y, vectors, scratch);  // what was read stays in registers
  fourier_short<TRANSPOSED>(line, in.data, in.stride, out.data, out.stride, vectors);
  out.narrow(line.length);
}

template <bool TRANSPOSED, typename In, typename Out, typename A>
void fourier(const FourierLine<A>& line, const In* x, int64_t stride_x, Out* y, int64_t stride_y, int64_t vectors,
             A* scratch) {
  if constexpr (SHORT_LINES<A>) {
    if (line.tree) return fourier_compiled<TRANSPOSED>(line, x, stride_x, y, stride_y, vectors, scratch);
  }
  transform<In, Out, A>(TRANSPOSED ? line.transposed : line.forward, {x, stride_x}, {y, stride_y}, vectors, scratch);
}

#define MLIP_FOURIER(TRANSPOSED, In, Out, A) \
  template void fourier<TRANSPOSED, In, Out, A>(const FourierLine<A>&, const In*, int64_t, Out*, int64_t, int64_t, A*)
MLIP_FOURIER(false, float, float, float);
MLIP_FOURIER(true, float, float, float);
MLIP_FOURIER(false, double, double, double);
MLIP_FOURIER(true, double, double, double);
MLIP_FOURIER(false, BFloat16, float, float);
MLIP_FOURIER(true, float, BFloat16, float);
MLIP_FOURIER(false, Half, float, float);
MLIP_FOURIER(true, float, Half, float);
#undef MLIP_FOURIER
