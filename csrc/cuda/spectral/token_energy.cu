// Energy of each token in some of the frequencies: P x, where the map P keeps those coefficients and makes tokens of
// them, squared and summed over channels.
//
//   x, dx [B, prefix + H W, D] float32, float16 or bfloat16     kept [coefficients] float32: 1 or 0
//   energies e, gradients g [B, prefix + H W] float32; 0 for the prefix
//   e_n = sum_d (P x)_nd^2             dx = 2 P (g P x), since P is a projection; 0 for the prefix
//
//   kernel       reads                              writes                     flops
//   energy       B H W D x                          B H W D / 32 partial sums  those of filtered
//   finish       B H W D / 32 partial sums          B (prefix + H W) e
//   backward     B H W D x, B H W D / 32 g          B (prefix + H W) D dx      twice those of filtered
//
// One pass each, bound by memory. A block owns 32 channels: see stages.cuh. The sums over its channels are partial sums
// that a second kernel adds in order: no atomics, the same bits from run to run.
#include "cuda/spectral/token_energy.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned FORWARD = bit(To::tile) | bit(To::factored) | bit(To::energies);
constexpr unsigned BACKWARD = bit(To::tile) | bit(To::factored) | bit(To::scaled) | bit(To::tokens);
constexpr int FINISH_THREADS = 256;

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_token_energy_kernel(const __grid_constant__ Map map) {
  run_stages<FORWARD>(map, [](const Block&, int64_t) {});
}

__global__ void __launch_bounds__(FINISH_THREADS)
    spectral_token_energy_finish_kernel(const float* partial, float* energy, int64_t batch, int64_t tokens,
                                        int64_t prefix, int64_t blocks) {
  const int64_t i = blockIdx.x * int64_t(FINISH_THREADS) + threadIdx.x;
  if (i >= batch * (prefix + tokens)) return;
  const int64_t b = i / (prefix + tokens), n = i % (prefix + tokens) - prefix;
  float sum = 0.0f;
  if (n >= 0) {
    for (int64_t block = 0; block < blocks; ++block) sum += partial[(block * batch + b) * tokens + n];
  }
  energy[i] = sum;
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_token_energy_backward_kernel(const __grid_constant__ Map map) {
  run_stages<BACKWARD>(map, [](const Block&, int64_t) {});
}

}  // namespace

void token_energy_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, map.fourier);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::factored);
  plan.conjugate(true);
  plan.back(along_h.transposed(), along_w.transposed(), To::energies);
  map.own_fragments = map.stages;
  map.table = table_of(map);
  spread(map);
}

int64_t token_energy_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_token_energy_kernel), map);
}

void token_energy_forward(const Map& map, float* energy, cudaStream_t stream) {
  launch_stages(spectral_token_energy_kernel, map, stream);
  const unsigned blocks = unsigned(ceil_div(map.batch * map.out_tokens, FINISH_THREADS));
  spectral_token_energy_finish_kernel<<<blocks, FINISH_THREADS, 0, stream>>>(
      map.partial, energy, map.batch, map.out_tokens - map.prefix, map.prefix, column_blocks(map));
}

void token_energy_backward_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, map.fourier);
  plan.read(height, width, false);
  for (const To what : {To::scaled, To::tokens}) {
    plan.conjugate(false);
    plan.forward(along_h, along_w, height, To::factored);
    plan.conjugate(true);
    plan.back(along_h.transposed(), along_w.transposed(), what);
  }
  share_fragments(map);
  map.table = table_of(map);
  spread(map);
}

int64_t token_energy_backward_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_token_energy_backward_kernel), map);
}

void token_energy_backward(const Map& map, cudaStream_t stream) {
  launch_stages(spectral_token_energy_backward_kernel, map, stream);
}

}  // namespace mlip::cuda::spectral
