#include "cpu/spectral/filtered_backward_weight.h"

#include "cpu/scratch.h"

#define MLIP_KERNELS "cpu/spectral/filtered_backward_weight_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {

template <typename T>
void filtered_backward_weight_sums(const FilteredBackwardWeight<T>& problem, int64_t begin, int64_t end) {
  Scratch scratch(size_t(problem.scratch()) * sizeof(Accumulate<T>));
  MLIP_CALL(sums<T>, problem, begin, end, scratch.as<Accumulate<T>>());
}

template <typename T>
void filtered_backward_weight_finish(const FilteredBackwardWeight<T>& problem, int64_t begin, int64_t end) {
  MLIP_CALL(finish<T>, problem, begin, end);
}

#define MLIP_INSTANTIATE(T)                                                                           \
  template void filtered_backward_weight_sums<T>(const FilteredBackwardWeight<T>&, int64_t, int64_t); \
  template void filtered_backward_weight_finish<T>(const FilteredBackwardWeight<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
