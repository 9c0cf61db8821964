#include "cpu/spectral/fourier_line.h"

#define MLIP_KERNELS "cpu/spectral/fourier_line_short_kernels.h"
#include "cpu/simd_copies.h"
