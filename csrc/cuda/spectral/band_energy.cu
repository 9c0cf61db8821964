// Energy of tokens in bands of frequencies: squared coefficients, summed over those of each band; in Fourier maps a
// coefficient with a mirror image counts twice.
//
//   x, dx [B, prefix + H W, D] float32, float16 or bfloat16     bands [coefficients] int32: the band of each
//   energies e, gradients g [B, bands, D] as x
//   e = sum_c m_c |z_c|^2             dx = 2 F^* (m g z) with the map F: z = F x, as in filtered.cu; 0 for the prefix
//
//   kernel       reads                          writes                 flops
//   energy       B H W D x                      B bands D e            those of separable or analysis
//   backward     B H W D x, B bands D g         B (prefix + H W) D dx  those of filtered
//
// One pass each, bound by memory. A block owns 32 channels: see stages.cuh. Energies: the last tile has the power of
// each coefficient. A warp owns a band then, a lane a channel, and adds them in order. Backward: the gradients of the
// bands, which all coefficients look up, are put into shared memory with the tokens of each batch element: see
// kept.cuh.
#include "cuda/spectral/band_energy.h"

#include "cuda/spectral/plan.h"
#include "cuda/spectral/spread.h"
#include "cuda/spectral/stages.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned FORWARD = bit(To::tile) | bit(To::powers);
constexpr unsigned BACKWARD = bit(To::tile) | bit(To::shares) | bit(To::tokens);
constexpr int SUMS = 4;  // running at once

__device__ inline void add_bands(const Map& map, const Block& block, int64_t b) {
  const float* tile = block.tile(map.stage[map.stages - 1].to);
  const int* bands = static_cast<const int*>(block.table);
  const int64_t channel = block.first_channel + block.lane;
  for (int64_t band = block.warp; band < map.count; band += WARPS) {
    float sums[SUMS] = {};
    for (int first = 0, row = 0; first < map.coefficients; first += map.frequencies, row += map.pitch) {
#pragma unroll 1
      for (int k = 0; k < map.frequencies; k += SUMS) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
          if (k + i < map.frequencies && bands[first + k + i] == band) sums[i] += tile[at(row + k + i, block.lane)];
        }
      }
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (channel < map.channels) put(map.out, map.type, (b * map.count + band) * map.channels + channel, sum);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_band_energy_kernel(const __grid_constant__ Map map) {
  run_stages<FORWARD>(map, [&](const Block& block, int64_t b) { add_bands(map, block, b); });
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_band_energy_backward_kernel(const __grid_constant__ Map map) {
  run_stages<BACKWARD>(map, [](const Block&, int64_t) {});
}

}  // namespace

void band_energy_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, map.fourier);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::powers);
  map.own_fragments = map.stages;
  map.table = table_of(map);
  spread(map);
}

int64_t band_energy_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_band_energy_kernel), map);
}

void band_energy_forward(const Map& map, cudaStream_t stream) {
  launch_stages(spectral_band_energy_kernel, map, stream);
}

void band_energy_backward_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width) {
  Plan plan(map, along_h, along_w, map.fourier);
  plan.read(height, width, false);
  plan.forward(along_h, along_w, height, To::shares);
  plan.conjugate(true);
  plan.back(along_h.transposed(), along_w.transposed(), To::tokens);
  map.own_fragments = map.stages;
  map.table = table_of(map);
  keep(map, map.count, 1);
  spread(map);
}

int64_t band_energy_backward_workspace(const Map& map) {
  return workspace_bytes(reinterpret_cast<const void*>(&spectral_band_energy_backward_kernel), map);
}

void band_energy_backward(const Map& map, cudaStream_t stream) {
  launch_stages(spectral_band_energy_backward_kernel, map, stream);
}

}  // namespace mlip::cuda::spectral
