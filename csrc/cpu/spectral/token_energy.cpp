#include "cpu/spectral/token_energy.h"

#include "cpu/scratch.h"

#define MLIP_KERNELS "cpu/spectral/token_energy_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {

template <typename T>
void token_energy_sums(const TokenEnergy<T>& problem, int64_t begin, int64_t end) {
  Scratch scratch(size_t(problem.scratch()) * sizeof(Accumulate<T>));
  MLIP_CALL(sums<T>, problem, begin, end, scratch.as<Accumulate<T>>());
}

template <typename T>
void token_energy_backward(const TokenEnergy<T>& problem, int64_t begin, int64_t end) {
  Scratch scratch(size_t(problem.scratch()) * sizeof(Accumulate<T>));
  MLIP_CALL(backward<T>, problem, begin, end, scratch.as<Accumulate<T>>());
}

template <typename T>
void token_energy_finish(const TokenEnergy<T>& problem, int64_t begin, int64_t end) {
  MLIP_CALL(finish<T>, problem, begin, end);
}

#define MLIP_INSTANTIATE(T)                                                        \
  template void token_energy_sums<T>(const TokenEnergy<T>&, int64_t, int64_t);     \
  template void token_energy_backward<T>(const TokenEnergy<T>&, int64_t, int64_t); \
  template void token_energy_finish<T>(const TokenEnergy<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
