// Fourier analysis of tokens on a grid: Z = M_h (X R_w^T) for every channel; on the token axis Z = R_w X.
//
//   x [B, prefix + H W, D] float32, float16 or bfloat16     M_h [2, H', H], R_w [2 K, W] float32: real, imaginary part
//   real, imaginary [B, H', K, D] as x; the prefix tokens are left out
//
//   reads    B H W D x, the matrices once per block
//   writes   2 B H' K D real and imaginary parts
//   flops    2 B D K H (2 W + 4 H'), five times that many on the tensor cores, twice for bfloat16
//
// One pass, bound by memory. A block owns 32 channels: see stages.cuh. Real and imaginary part of a coefficient are
// products of the same lane, as rows g and g + 8 of its matrix; so the complex matrix is (c, s; -s, c) in a lane.
#include "cuda/spectral/analysis.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned MADE = bit(To::tile) | bit(To::spectrum);

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_analysis_kernel(const __grid_constant__ Map map) {
  run_stages<MADE>(map, [](const Block&, int64_t) {});
}

}  // namespace

void analysis_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, true);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::spectrum);
  map.own_fragments = map.stages;
  spread(map);
}

int64_t analysis_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_analysis_kernel), map);
}

void analysis_forward(const Map& map, cudaStream_t stream) { launch_stages(spectral_analysis_kernel, map, stream); }

}  // namespace mlip::cuda::spectral
