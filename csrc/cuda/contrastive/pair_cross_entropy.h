// Cross-entropy over the rows and columns of one matrix of logits: see pair_cross_entropy.cu. No torch headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda::contrastive {

struct PairCrossEntropy {
  Type type;
  int64_t rows, columns;  // B, C
  bool both;              // then B = C
  double label_smoothing;
  const void* logits;     // [B, C], unit stride along C
  int64_t stride;         // from row to row, in elements
  bool vector;            // whether rows of `logits`, `grad_logits` and `column_terms` move 16 bytes at a time
  const int64_t* labels;  // [B]
  float* row_terms;       // [2, B] largest logit, log of the sum of exponentials below it
  float* column_terms;    // [2, C] if both

  // Forward, written:
  float* row_partial;     // [3, column tiles, B] largest, sum of exponentials below it, sum of distances from it
  float* column_partial;  // [2, row tiles, C] if both
  double* row_sums;       // [4, blocks of rows] losses, logs, maxima, distances
  double* column_sums;    // [4, blocks of columns] if both
  float* loss;            // one

  // Backward:
  const float* grad;  // one, of the loss
  void* grad_logits;  // [B, C], written
};

// How many tiles the rows and the columns are cut into, and blocks of lines that are finished together.
int64_t pair_cross_entropy_row_tiles(const PairCrossEntropy& problem);
int64_t pair_cross_entropy_column_tiles(const PairCrossEntropy& problem);
int64_t pair_cross_entropy_line_blocks(int64_t lines);

void pair_cross_entropy(const PairCrossEntropy& problem, cudaStream_t stream);
void pair_cross_entropy_backward(const PairCrossEntropy& problem, cudaStream_t stream);

}  // namespace mlip::cuda::contrastive
