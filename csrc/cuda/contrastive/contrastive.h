// Problems of the contrastive family's CUDA kernels, and their launchers: means of the best similarity of every token
// (token_maxima.cu), their gradient (token_maxima_backward.cu), and the cross-entropy over the rows and columns of a
// matrix of logits (pair_cross_entropy.cu). No torch headers.
#pragma once
#include "cuda/elements.h"

namespace mlip::cuda::contrastive {

// --- similarities of tokens ------------------------------------------------------------------------------------------

constexpr int MOST_TOKENS = 0xffff;  // on each side: indices in a list have 16 bits

// Tokens of one side, [batch, count, channels] with unit stride along channels.
struct TokenSide {
  const void* values;
  int64_t stride_batch, stride_token;  // in elements
  bool vector;                         // whether rows can be read 16 bytes at a time
  const Flag* mask;                    // [batch, count], or null: all are real
  const float* weight;                 // [batch, count], normalized: those of a row add up to 1
  int64_t batch;
  int count;
};

struct TokenMaxima {
  Type type;
  int64_t channels;
  TokenSide images, texts;

  // Written for real tokens alone; the last four may be null.
  float* per_image;     // [B, C]
  float* per_text;      // [C, B]
  void* argmax_text;    // [B, C, N], integers of argmax_text_bytes: 1, 2 or 4
  void* argmax_image;   // [B, C, M], integers of argmax_image_bytes
  float* text_maxima;   // [B, C, N]
  float* image_maxima;  // [B, C, M]
  int argmax_text_bytes, argmax_image_bytes;

  // How the work is cut: `choose_tiling`.
  int texts_per_block;
  int stages;     // pieces of the tokens in flight: 1 or 2
  bool resident;  // whether the image stays in shared memory
  bool held;      // whether 64 tokens of the texts stay there while they meet all tokens of the image
};

// Fills in how the work is cut on the current device; false where its shared memory is too small for so many tokens.
bool choose_tiling(TokenMaxima& problem);
int64_t token_maxima_blocks(const TokenMaxima& problem);
void token_maxima(const TokenMaxima& problem, cudaStream_t stream);

// Indices of the best tokens: integers of 1, 2 or 4 bytes, [b, c, token] with unit stride along tokens.
struct Argmax {
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
  const float* weight;                   // [B, N], normalized
  const float* other_weight;             // [C, M]
  Argmax argmax_other;                   // [B, C, N]
  Argmax argmax;                         // [B, C, M]
  bool vector;                           // whether rows of `others` and `grad` move four elements at a time
  void* grad;                            // [B, N, D], written
};

int64_t token_maxima_backward_blocks(const TokenMaximaBackward& problem);
void token_maxima_backward(const TokenMaximaBackward& problem, cudaStream_t stream);

// --- cross-entropy of a matrix of logits -----------------------------------------------------------------------------

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
