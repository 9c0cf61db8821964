// Applies a FourierLine (cpu/spectral/fourier_line.h). Included by every *_kernels.h that does; the code itself is
// compiled once, by cpu/spectral/fourier_line_apply.cpp.

// y = line(x), or the transposed map, for `vectors` consecutive vectors of channels. T -> A forward, A -> T transposed,
// for every T that accumulates in A; x and y may be the same memory. `scratch` holds line.scratch() elements.
template <bool TRANSPOSED, typename In, typename Out, typename A>
void fourier(const FourierLine<A>& line, const In* x, int64_t stride_x, Out* y, int64_t stride_y, int64_t vectors,
             A* scratch);

// The same where line.tree is not null. By cpu/spectral/fourier_line_short.cpp.
template <bool TRANSPOSED>
void fourier_short(const FourierLine<float>& line, const float* x, int64_t stride_x, float* y, int64_t stride_y,
                   int64_t vectors);
