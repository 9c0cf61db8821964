#include "cpu/merging/match.h"

#include "cpu/scratch.h"

#define MLIP_KERNELS "cpu/merging/match_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {

template <typename T>
void match_similarities(const Similarities<T>& problem, int64_t begin, int64_t end) {
  MLIP_CALL(similarities<T>, problem, begin, end);
}

#define MLIP_INSTANTIATE(T) template void match_similarities<T>(const Similarities<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
