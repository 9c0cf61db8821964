// Problems of the merging family's CUDA kernels, and their launchers: which tokens merge (match.cu), merging rows and
// copying them back (merge.cu), and means over tokens (weighted_mean.cu). No torch headers.
#pragma once
#include "cuda/elements.h"

namespace mlip::cuda::merging {

// --- which tokens merge ----------------------------------------------------------------------------------------------

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
  int* target;    // [B, S] its best target

  int64_t* assignment;  // [B, N]
  int64_t* kept;        // [B, N - r]
  int64_t* removed;     // [B, r]
  bool* merged_mask;    // [B, N - r], only with a mask
  bool* dropped;        // [B, N], only with a mask

  int stages;  // pieces of the metric in flight: `choose_stages`

  MLIP_HOST_DEVICE int first_source() const { return prefix + prefix % 2; }
  MLIP_HOST_DEVICE int first_target() const { return prefix + 1 - prefix % 2; }
  MLIP_HOST_DEVICE int sources() const { return count_from(first_source()); }
  MLIP_HOST_DEVICE int targets() const { return count_from(first_target()); }
  MLIP_HOST_DEVICE bool real(int64_t b, int n) const { return mask == nullptr || mask[b * tokens + n]; }

 private:
  MLIP_HOST_DEVICE int count_from(int first) const { return first < tokens ? (tokens - first + 1) / 2 : 0; }
};

// Fills in how much a block has in flight on the current device.
void choose_stages(Match& problem);
int64_t match_blocks(const Match& problem);  // of the largest launch
void match(const Match& problem, cudaStream_t stream);

// --- merging rows ----------------------------------------------------------------------------------------------------

// Tensors are contiguous, except that the rows that are read may have any strides over batch and tokens. Which pointers
// are read and written depends on the kernel.
struct MergeRows {
  Type type;                                 // of from and to
  int64_t batch, tokens, outputs, channels;  // B, N < 2^31, N', C

  const void* from;                    // [B, N, C], for spread [B, N', C]
  int64_t stride_batch, stride_token;  // in elements
  const int64_t* assignment;           // [B, N]
  const int64_t* kept;                 // [B, N']
  const int64_t* removed;              // [B, N - N']
  const Flag* mask;                    // [B, N'], or null: every output row is real; merge only
  const Flag* dropped;                 // [B, N], or null: every input row has an output row
  const float* size;                   // [B, N], or null: every size is 1; merge only
  const float* known_weight;           // [B, N], or null: every weight is 1; combine and spread only

  void* to;            // [B, N', C], for spread [B, N, C]
  float* merged_size;  // [B, N'], merge only
  float* weight;       // [B, N], merge only

  bool vector;  // whether rows of both can be moved 16 bytes at a time
};

int64_t merge_blocks(const MergeRows& problem);  // of merge and combine
int64_t spread_blocks(const MergeRows& problem);
void merge_rows(const MergeRows& problem, cudaStream_t stream);
void combine_rows(const MergeRows& problem, cudaStream_t stream);
void spread_rows(const MergeRows& problem, cudaStream_t stream);

// --- weighted means --------------------------------------------------------------------------------------------------

// Tensors are contiguous, except that x may have any strides over batch and tokens. Which pointers are read and
// written depends on the kernel; float pointers are float32 whatever `type` is.
struct WeightedMean {
  Type type;  // of x, grad, mean and grad_x
  int64_t batch, tokens, channels;
  int64_t prefix;  // leading tokens that take no part

  const void* x;                       // [B, N, D]
  int64_t stride_batch, stride_token;  // of x, in elements
  const float* weight;                 // [B, N], or null: every token weighs 1
  const void* grad;                    // [B, D]
  const float* known_total;            // [B] W_b, as the forward pass left it

  float* partial;        // [splits, B, D]; used where splits > 1
  float* partial_total;  // [splits, B]
  void* mean;            // [B, D]
  float* total;          // [B]
  void* grad_x;          // [B, N, D]
  float* grad_weight;    // [B, N]

  int64_t splits;  // parts into which the tokens of one batch element are cut
  bool vector;     // whether rows can be read 16 bytes at a time
};

// How many parts: enough blocks to fill a GPU, at least 256 tokens each. Depends on the shape alone, so results do not
// change from one GPU to another.
int64_t weighted_mean_splits(Type type, int64_t batch, int64_t tokens, int64_t channels);
void weighted_mean_forward(const WeightedMean& problem, cudaStream_t stream);
void weighted_mean_backward(const WeightedMean& problem, cudaStream_t stream);
void weighted_mean_backward_weight(const WeightedMean& problem, cudaStream_t stream);

}  // namespace mlip::cuda::merging
