#include "cpu/merging/weighted_mean.h"

#define MLIP_KERNELS "cpu/merging/weighted_mean_kernels.h"
#include "cpu/simd.h"

namespace mlip::cpu {

template <typename T>
void weighted_mean_sums(const WeightedMean<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(sums<T>, problem, begin, end);
}

template <typename T>
void weighted_mean_finish(const WeightedMean<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(finish<T>, problem, begin, end);
}

template <typename T>
void weighted_mean_backward(const WeightedMean<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(backward<T>, problem, begin, end);
}

template <typename T>
void weighted_mean_products(const WeightedMean<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(products<T>, problem, begin, end);
}

template <typename T>
void weighted_mean_centre(const WeightedMean<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(centre<T>, problem, begin, end);
}

#define MLIP_INSTANTIATE(T)                                                          \
  template void weighted_mean_sums<T>(const WeightedMean<T>&, int64_t, int64_t);     \
  template void weighted_mean_finish<T>(const WeightedMean<T>&, int64_t, int64_t);   \
  template void weighted_mean_backward<T>(const WeightedMean<T>&, int64_t, int64_t); \
  template void weighted_mean_products<T>(const WeightedMean<T>&, int64_t, int64_t); \
  template void weighted_mean_centre<T>(const WeightedMean<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
