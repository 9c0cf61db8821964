#include "cpu/spectral/lines.h"

#define MLIP_KERNELS "cpu/spectral/lines_short_kernels.h"
#include "cpu/simd_copies.h"
