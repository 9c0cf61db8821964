#include "cpu/spectral/band_energy.h"

#include "cpu/scratch.h"

#define MLIP_KERNELS "cpu/spectral/band_energy_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {

template <typename T>
void band_energy(const BandEnergy<T>& problem, int64_t begin, int64_t end) {
  Scratch scratch(size_t(problem.scratch()) * sizeof(Accumulate<T>));
  MLIP_CALL(forward<T>, problem, begin, end, scratch.as<Accumulate<T>>());
}

template <typename T>
void band_energy_backward(const BandEnergy<T>& problem, int64_t begin, int64_t end) {
  Scratch scratch(size_t(problem.scratch()) * sizeof(Accumulate<T>));
  MLIP_CALL(backward<T>, problem, begin, end, scratch.as<Accumulate<T>>());
}

#define MLIP_INSTANTIATE(T)                                             \
  template void band_energy<T>(const BandEnergy<T>&, int64_t, int64_t); \
  template void band_energy_backward<T>(const BandEnergy<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
