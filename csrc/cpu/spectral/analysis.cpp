#include "cpu/spectral/analysis.h"

#include "cpu/scratch.h"

#define MLIP_KERNELS "cpu/spectral/analysis_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {

template <typename T>
void analysis(const Analysis<T>& problem, int64_t begin, int64_t end) {
  Scratch scratch(size_t(problem.scratch()) * sizeof(Accumulate<T>));
  MLIP_CALL(analysis_tasks<T>, problem, begin, end, scratch.as<Accumulate<T>>());
}

#define MLIP_INSTANTIATE(T) template void analysis<T>(const Analysis<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
