// Fourier synthesis of tokens on a grid: X = (M_h Z) S_w^T for every channel; on the token axis X = S_w Z.
//
//   real, imaginary [B, H, K, D] float32, float16 or bfloat16     M_h [2, H', H], S_w [W', 2 K] float32
//   x [B, prefix + H' W', D] as real; the prefix tokens are 0
//
//   reads    2 B H K D real and imaginary parts, the matrices once per block
//   writes   B (prefix + H' W') D x
//   flops    2 B D K H' (4 H + 2 W'), five times that many on the tensor cores, twice for bfloat16
//
// One pass, bound by memory: analysis.cu backwards. A block owns 32 channels: see stages.cuh.
#include "cuda/spectral/synthesis.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned MADE = bit(To::tile) | bit(To::tokens);

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_synthesis_kernel(const __grid_constant__ Map map) {
  run_stages<MADE>(map, [](const Block&, int64_t) {});
}

}  // namespace

void synthesis_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int frequencies) {
  Plan plan(map, along_h, along_w, true);
  plan.read(height, frequencies, true);
  plan.back(along_h, along_w, To::tokens);
  map.own_fragments = map.stages;
  spread(map);
}

int64_t synthesis_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_synthesis_kernel), map);
}

void synthesis_forward(const Map& map, cudaStream_t stream) { launch_stages(spectral_synthesis_kernel, map, stream); }

}  // namespace mlip::cuda::spectral
