// Cross-entropy over the rows of a matrix of logits l [B, C], or (B = C) the mean of that and the same over its
// columns:
//
//   row i:     log sum_j exp(l_ij) - l_i,label(i)         column j:     log sum_i exp(l_ij) - l_label(j),j
//
// With label smoothing s: (1 - s) times that plus s times the mean of log sum exp - l over all classes. Each
// log-sum-exp is stored as two terms, the largest logit of its row or column and the log of the sum of exponentials
// below it, which give small losses of large logits without cancellation. The gradient of l_ij is
//
//   grad / 2 (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j) - targets)
//
//   forward     reads B C logits, and writes and reads again 2 numbers for each column and block of rows
//   backward    reads B C logits, and writes B C of their gradient
//
// Both are bound by the exponentials, about 20 instructions for each vector; the backward pass of a matrix that no
// cache holds, by memory. Each pass takes one exponential of each logit, exp(l) itself, for the row and the column
// alike, wherever all maxima of a tile (all log-sum-exps that a row of the gradient meets) are of a size at which it
// neither overflows nor rounds to 0; then l needs no subtraction, whose rounding would count. Elsewhere it takes two,
// of the distances from the largest logits of the row and the column.
//
// A task of the forward pass is a block of rows. It walks over tiles of them that fit the second-level cache, and
// stores for each column its largest logit and the sum of exponentials below it. Blocks are merged in order; how rows
// are cut into blocks depends on the shape alone, and so do the bits.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace mlip::cpu {

// The terms of the loss, summed over some rows, or over some columns.
struct PairSums {
  double own;        // log-sum-exp less the logit of the label
  double logs;       // log of the sum of exponentials below the largest
  double maxima;     // largest logits
  double distances;  // l - largest, of all logits; of rows, and with smoothing
};

template <typename T>
struct PairCrossEntropy {
  using A = Accumulate<T>;
  static constexpr int64_t COLUMNS_OF_TASK = 512;
  static constexpr int64_t STREAMED_BYTES = int64_t(16) << 20;

  int64_t rows, columns;
  bool both;  // then rows == columns
  double label_smoothing;
  const T* logits;  // [B, C], unit stride along C
  int64_t stride;
  const int64_t* labels;  // [B], each in 0 ... C - 1
  A* row_terms;           // [2, B]: largest logit, log of the sum; written by the forward pass, read by the other
  A* column_terms;        // [2, C] if both

  // Forward:
  A* partial;             // [blocks, 2, padded columns] if both: largest logit, sum
  A* own;                 // [B] the logit of each row's label
  PairSums* row_sums;     // [blocks]
  PairSums* column_sums;  // [column tasks]

  // Backward:
  A grad;            // of the loss, halved if both
  A* column_factor;  // [C] exp(-lse) if both
  bool columns_fit;  // whether all of these are finite and not 0
  T* grad_logits;    // [B, C]

  // Few enough for many threads, many enough to make what is left for each column small.
  int64_t block_rows() const { return rows < 512 ? 16 : rows < 2048 ? rows / 128 * 4 : 64; }
  int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
  int64_t padded_columns() const { return (columns + 15) / 16 * 16; }
  // Whether the gradient goes past the caches: it is large, and its rows start on cache lines.
  bool streamed() const {
    const int64_t row_bytes = columns * int64_t(sizeof(T));
    return rows * row_bytes >= STREAMED_BYTES && row_bytes % 64 == 0 &&
           reinterpret_cast<uintptr_t>(grad_logits) % 64 == 0;
  }
  int64_t column_tasks() const { return both ? (columns + COLUMNS_OF_TASK - 1) / COLUMNS_OF_TASK : 0; }
};

// Forward, over blocks of rows: row_terms, own, row_sums and partial.
template <typename T>
void pair_cross_entropy_rows(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end);

// Forward, over tasks of columns, after the rows: column_terms and column_sums.
template <typename T>
void pair_cross_entropy_columns(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end);

// Forward, at last: the loss, summed over pairs.
template <typename T>
double pair_cross_entropy_loss(const PairCrossEntropy<T>& problem);

// Backward, first, over columns: column_factor. Returns whether all of them are finite and not 0: columns_fit.
template <typename T>
bool pair_cross_entropy_column_factors(const PairCrossEntropy<T>& problem);

// Backward, over rows: grad_logits without the one-hot term of the labels, label smoothing included.
template <typename T>
void pair_cross_entropy_backward(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end);

// Backward, at last, over labels: grad_logits of the targets, without cancellation where the probability is near 1.
template <typename T>
void pair_cross_entropy_backward_targets(const PairCrossEntropy<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
