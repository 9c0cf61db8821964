#include "cpu/spectral/lines.h"

#define MLIP_KERNELS "cpu/spectral/lines_apply_kernels.h"
#include "cpu/simd_copies.h"
