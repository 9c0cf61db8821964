// Spectral filter of tokens on a grid or on the token axis: an orthonormal map, a weight for each coefficient and
// channel, the inverse map.
//
//   x, y [B, prefix + H W, D] float32, float16 or bfloat16; the prefix tokens are copied
//   cosine    A_h [H, H], A_w [W, W], weight [H, W, D]                Y = A_h^T (weight * A_h X A_w^T) A_w
//   Fourier   M_h [2, H, H], R_w [2 K, W], weight [H, K, D, 2]        as analysis, complex product, synthesis
//
//   reads    B (prefix + H W) D x, the weight and the matrices once per block
//   writes   B (prefix + H W) D y
//   flops    cosine 4 B D H W (H + W), Fourier 4 B D H K (4 H + 2 W), five times that many on the tensor cores,
//            twice for bfloat16
//
// One pass, bound by memory. A block owns 32 channels: see stages.cuh. Real and imaginary part of a coefficient are
// products of the same lane. A block keeps the weights of its channels in shared memory while it goes through the batch
// (kept.cuh); spread.h tells how many blocks there are, and so how often they are read. Those that do not fit are read
// with every batch element, from the L2 cache: none on grids of up to 14 x 14, an eighth of them on grids
// of 16 x 16 in Fourier maps with 164 KiB of shared memory, two thirds on grids of 24 x 24 in cosine maps with 228 KiB.
#include "cuda/spectral/filtered.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned MADE = bit(To::tile) | bit(To::weighted) | bit(To::tokens);

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_filtered_kernel(const __grid_constant__ Map map) {
  run_stages<MADE>(map, [](const Block&, int64_t) {});
}

}  // namespace

void filtered_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, map.fourier);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::weighted);
  plan.conjugate(true);
  plan.back(along_h.transposed(), along_w.transposed(), To::tokens);
  map.own_fragments = map.stages;
  spread(map);
  if (map.splits == map.batch && map.row_vector) return;  // the weight is used once, in whole sectors
  keep(map, map.coefficients, map.fourier ? 2 : 1);
  spread(map);
}

int64_t filtered_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_filtered_kernel), map);
}

void filtered_forward(const Map& map, cudaStream_t stream) { launch_stages(spectral_filtered_kernel, map, stream); }

}  // namespace mlip::cuda::spectral
