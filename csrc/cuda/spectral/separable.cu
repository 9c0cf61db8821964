// Separable maps of tokens on a grid: Y = A_h X A_w^T for every channel; on the token axis Y = A_w X.
//
//   x [B, prefix + H W, D] float32, float16 or bfloat16     A_h [H', H], A_w [W', W] float32
//   y [B, prefix + H' W', D] as x; the prefix tokens are copied
//
//   reads    B (prefix + H W) D x, the matrices once per block
//   writes   B (prefix + H' W') D y
//   flops    2 B D W' H (W + H'), five times that many on the tensor cores, twice for bfloat16
//
// One pass, bound by memory: 7 to 24 flops per byte on grids of 14 x 14 to 24 x 24. A block owns 32 channels: see
// stages.cuh. On the token axis the matrix does not fit a block and is streamed from the L2 cache.
#include "cuda/spectral/separable.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned MADE = bit(To::tile) | bit(To::tokens);

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_separable_kernel(const __grid_constant__ Map map) {
  run_stages<MADE>(map, [](const Block&, int64_t) {});
}

}  // namespace

void separable_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, false);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::tokens);
  map.own_fragments = map.stages;
  spread(map);
}

int64_t separable_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_separable_kernel), map);
}

void separable_forward(const Map& map, cudaStream_t stream) { launch_stages(spectral_separable_kernel, map, stream); }

}  // namespace mlip::cuda::spectral
