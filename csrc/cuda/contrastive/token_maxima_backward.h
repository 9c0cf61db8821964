// Gradient of the tokens of one side from the means of the best similarities: see token_maxima_backward.cu. No torch
// headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda::contrastive {

// One of the two maps: integers of 1, 2 or 4 bytes, [b, c, token] with unit stride along tokens.
struct TokenMap {
  const void* values;
  int bytes;
  int64_t stride_b, stride_c;
};

struct TokenMaximaBackward {
  Type type;
  int64_t batch, other_batch, channels;  // B, C, D
  int count, other_count;                // N, M
  const float* grad_mean;                // [B, C]
  const float* grad_other_mean;          // [C, B]
  const void* others;                    // [C, M, D], unit stride along D
  int64_t stride_batch, stride_token;    // of them, in elements
  const Flag* mask;                      // [B, N], or null: all are real
  const Flag* other_mask;                // [C, M], or null
  const float* share;                    // [B, N]
  const float* other_share;              // [C, M]
  TokenMap best_other;                   // [B, C, N]
  TokenMap best;                         // [B, C, M]
  bool vector;                           // whether rows of `others` and `grad` move four elements at a time
  void* grad;                            // [B, N, D], written
};

int64_t token_maxima_backward_blocks(const TokenMaximaBackward& problem);

void token_maxima_backward(const TokenMaximaBackward& problem, cudaStream_t stream);

}  // namespace mlip::cuda::contrastive
