// Launchers of the CUDA kernels that choose which tokens merge; the story is told in match.cu. No torch headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda {

enum class GuideType { float32, float16, bfloat16, float64 };

struct Match {
  static constexpr int ONE_LAUNCH = 1024;  // tokens for which one block does all that a sample needs

  Type type;  // of the metric
  int64_t batch;
  int tokens, prefix;  // N, and how many leading ones take no part
  int r;               // 1 <= r <= min(S, T)

  const void* metric;                  // [B, N, D], unit stride along D
  int64_t stride_batch, stride_token;  // in elements
  int64_t width;                       // D
  bool vector;                         // whether rows can be read 16 bytes at a time

  const void* guide;  // [B, N], or null
  GuideType guide_type;
  int64_t guide_stride_batch, guide_stride_token;
  double guide_weight;
  const Flag* mask;  // [B, N] contiguous, true for real tokens, or null

  // Workspace, used where there are more than ONE_LAUNCH tokens.
  uint64_t* key;  // [B, S] the score of every source as a number that is ordered alike, 0 where it has no target
  int* best;      // [B, S] its target

  int64_t* assignment;  // [B, N]
  int64_t* kept;        // [B, N - r]
  int64_t* removed;     // [B, r]
  bool* merged_mask;    // [B, N - r], only with a mask
  bool* dropped;        // [B, N], only with a mask

  int stages;  // pieces of the metric in flight: `match_plan`

  MLIP_HOST_DEVICE int first_source() const { return prefix + prefix % 2; }
  MLIP_HOST_DEVICE int first_target() const { return prefix + 1 - prefix % 2; }
  MLIP_HOST_DEVICE int sources() const { return count_from(first_source()); }
  MLIP_HOST_DEVICE int targets() const { return count_from(first_target()); }
  MLIP_HOST_DEVICE bool real(int64_t b, int n) const { return mask == nullptr || mask[b * tokens + n]; }

 private:
  MLIP_HOST_DEVICE int count_from(int first) const { return first < tokens ? (tokens - first + 1) / 2 : 0; }
};

// Fills in how much a block has in flight on the current device.
void match_plan(Match& problem);

// Blocks of the largest launch.
int64_t match_blocks(const Match& problem);

void match(const Match& problem, cudaStream_t stream);

}  // namespace mlip::cuda
