// Launchers of the CUDA kernels that merge rows of tokens and copy them back; the story is told in merge.cu. No torch
// headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda {

// Tensors are contiguous, except that the rows that are read may have any strides over batch and tokens.
struct MergeRows {
  Type type;            // of the rows
  int64_t batch;        // B
  int tokens, outputs;  // N, N'
  int64_t channels;     // C
  bool vector;          // whether rows can be read and written 16 bytes at a time

  const void* from;                    // [B, N, C], for spread [B, N', C]
  int64_t stride_batch, stride_token;  // in elements
  const int64_t* assignment;           // [B, N]
  const int64_t* kept;                 // [B, N']
  const int64_t* removed;              // [B, N - N']
  const bool* mask;                    // [B, N'], or null: every output row is real; merge only
  const bool* dropped;                 // [B, N], or null: every input row has an output row
  const float* size;                   // [B, N], or null: every size is 1; merge only
  const float* known_weight;           // [B, N], or null: every weight is 1; combine and spread only

  void* to;            // [B, N', C], for spread [B, N, C]
  float* merged_size;  // [B, N'], merge only
  float* weight;       // [B, N], merge only
};

// Blocks of each launch.
int64_t combine_blocks(const MergeRows& problem);  // merge and combine
int64_t spread_blocks(const MergeRows& problem);

void merge_rows(const MergeRows& problem, cudaStream_t stream);
void combine_rows(const MergeRows& problem, cudaStream_t stream);
void spread_rows(const MergeRows& problem, cudaStream_t stream);

}  // namespace mlip::cuda
