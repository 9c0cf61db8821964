// Launchers of the CUDA kernels of weighted_mean; the story is told in weighted_mean.cu. No torch headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda {

// Tensors are contiguous, except that x may have any strides over batch and tokens. Which pointers are read and
// written depends on the kernel, as in cpu/merging/weighted_mean.h; float pointers are float32 whatever `type` is.
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

// Grid and block of each kernel. The kernels use static shared memory only.
Launch weighted_mean_sums_launch(const WeightedMean& problem);
Launch weighted_mean_finish_launch(const WeightedMean& problem);
Launch weighted_mean_rows_launch(const WeightedMean& problem);  // backward and products
Launch weighted_mean_centre_launch(const WeightedMean& problem);

void weighted_mean_forward(const WeightedMean& problem, cudaStream_t stream);
void weighted_mean_backward(const WeightedMean& problem, cudaStream_t stream);
void weighted_mean_backward_weight(const WeightedMean& problem, cudaStream_t stream);

}  // namespace mlip::cuda
