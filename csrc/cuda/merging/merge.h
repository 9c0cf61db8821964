// Launchers of the CUDA kernels that merge rows and copy them back; the story is told in merge.cu. No torch headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda {

// Tensors are contiguous, except that the rows that are read may have any strides over batch and tokens. Which pointers
// are read and written depends on the kernel, as in cpu/merging/merge.h.
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

// Grid and block of the kernels. They use static shared memory only.
Launch merge_launch(const MergeRows& problem);  // merge and combine
Launch spread_launch(const MergeRows& problem);

void merge_rows(const MergeRows& problem, cudaStream_t stream);
void combine_rows(const MergeRows& problem, cudaStream_t stream);
void spread_rows(const MergeRows& problem, cudaStream_t stream);

}  // namespace mlip::cuda
