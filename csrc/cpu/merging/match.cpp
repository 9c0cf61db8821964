#include "cpu/merging/match.h"

#include <type_traits>
#include <utility>

#define MLIP_BF16_VARIANT
#define MLIP_KERNELS "cpu/merging/match_kernels.h"
#include "cpu/simd.h"

namespace mlip::cpu {

template <typename T>
void match_similarities(const Similarities<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA_BF16(T, similarities<T>, problem, begin, end);
}

template <typename T>
float match_exactly(const Similarities<T>& problem, int64_t b, int64_t source, int64_t target) {
  MLIP_DISPATCH_ISA(exact_similarity<T>, problem, b, source, target);
}

#define MLIP_INSTANTIATE(T) template void match_similarities<T>(const Similarities<T>&, int64_t, int64_t)
#define MLIP_INSTANTIATE_EXACTLY(T) template float match_exactly<T>(const Similarities<T>&, int64_t, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);
MLIP_INSTANTIATE_EXACTLY(float);
MLIP_INSTANTIATE_EXACTLY(BFloat16);
MLIP_INSTANTIATE_EXACTLY(Half);

}  // namespace mlip::cpu
