// Which tokens are real, found by a block. Device code only.
#pragma once
#include <cstdint>

#include "cuda/types.h"

namespace mlip::cuda::contrastive {

constexpr int WARP = 32;
constexpr int WARPS = 4;
constexpr int THREADS = WARP * WARPS;

// Writes to `places` the 0 <= i < count with mask[first + i], ascending (all, without a mask), and returns how many
// they are. By all threads of a block; each warp looks at one part, twice: to count, and to write. `counts` has WARPS
// members. All threads see the result; between two calls with the same `counts` there is a barrier.
__device__ inline int find_places(const Flag* mask, int64_t first, int count, uint16_t* places, int* counts) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int part = (count + THREADS - 1) / THREADS * WARP;
  const int begin = warp * part, end = begin + part < count ? begin + part : count;
  const auto real = [&](int i) { return i < end && (mask == nullptr || mask[first + i]); };

  int found = 0;
  for (int i = begin; i < end; i += WARP) found += __popc(__ballot_sync(~0u, real(i + lane)));
  if (lane == 0) counts[warp] = found;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += counts[w];
    total += counts[w];
  }
  for (int i = begin; i < end; i += WARP) {
    const bool here = real(i + lane);
    const unsigned all = __ballot_sync(~0u, here);
    if (here) places[before + __popc(all & ((1u << lane) - 1))] = uint16_t(i + lane);
    before += __popc(all);
  }
  __syncthreads();
  return total;
}

}  // namespace mlip::cuda::contrastive
