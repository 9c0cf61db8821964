// Gradient of the weight of a spectral filter: the spectrum of the gradient times that of x, conjugated, summed over
// the batch. In Fourier maps a coefficient with a mirror image counts twice.
//
//   x, grad [B, prefix + H W, D] float32, float16 or bfloat16; the prefix tokens take no part
//   dW [H, W, D] (cosine) or [H, K, D, 2] (Fourier) float32
//
//   kernel                    reads                        writes
//   sums                      2 B H W D x and grad         splits |dW| partial sums
//   sums of splits            splits |dW| partial sums     |dW|
//   flops    cosine 4 B D H W (H + W), Fourier 4 B D H K (4 H + 2 W), five times that many on the tensor cores
//
// Bound by memory; both spectra are computed again, which is cheaper than keeping them. A block owns 32 channels and
// every splits-th batch element: see stages.cuh. It adds to its partial sum in shared memory (kept.cuh), one batch
// element after another, and writes it once; a second kernel adds the partial sums in order: no atomics, the same bits
// from run to run. What shared memory does not hold is added to in global memory, that is in the L2 cache: on grids of
// 14 x 14 nothing in cosine maps, in Fourier maps nothing with 228 KiB and 46 of 112 coefficients with 164 KiB.
//
// Every partial sum costs another two |dW|, and to keep the bits the batch is cut by the shape alone: into the 216
// blocks that an A100 holds at once, two for each multiprocessor, but into 16 parts at most. Then 256 elements of 768
// channels make 9 parts, whose sums are 1 / 14 of what is moved in half precision.
#include "cuda/spectral/filtered_backward_weight.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned MADE = bit(To::tile) | bit(To::products);
constexpr int64_t BLOCKS_WANTED = 216;
constexpr int64_t MOST_SPLITS = 16;
constexpr int FINISH_THREADS = 256;

__global__ void __launch_bounds__(THREADS, BLOCKS - 1)
    spectral_filtered_backward_weight_kernel(const __grid_constant__ Map map) {
  run_stages<MADE>(map, [](const Block&, int64_t) {});
}

__global__ void __launch_bounds__(FINISH_THREADS)
    spectral_filtered_backward_weight_finish_kernel(const float* partial, float* grad_weight, int64_t count,
                                                    int64_t splits) {
  const int64_t i = blockIdx.x * int64_t(FINISH_THREADS) + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * count + i];
  grad_weight[i] = sum;
}

}  // namespace

void filtered_backward_weight_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, map.fourier);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::tile);
  plan.hold();
  map.second_stages = map.stages;
  map.second_tile = plan.start_again();
  plan.forward(along_h, along_w, height, To::products);
  share_fragments(map);
  const int64_t wanted = BLOCKS_WANTED / column_blocks(map);
  map.splits = parts_of(map, wanted < MOST_SPLITS ? wanted : MOST_SPLITS);
  if (map.splits < map.batch || !map.row_vector) keep(map, map.coefficients, map.fourier ? 2 : 1);
}

int64_t filtered_backward_weight_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_filtered_backward_weight_kernel), map);
}

void filtered_backward_weight(const Map& map, float* grad_weight, cudaStream_t stream) {
  launch_stages(spectral_filtered_backward_weight_kernel, map, stream);
  if (map.splits == 1) return;  // the sums are the result
  const int64_t count = int64_t(map.coefficients) * map.channels * (map.fourier ? 2 : 1);
  const unsigned blocks = unsigned(ceil_div(count, FINISH_THREADS));
  spectral_filtered_backward_weight_finish_kernel<<<blocks, FINISH_THREADS, 0, stream>>>(map.partial, grad_weight,
                                                                                         count, map.splits);
}

}  // namespace mlip::cuda::spectral
