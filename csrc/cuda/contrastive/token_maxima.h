// Means of the best similarity of every token, for every pair of an image and a text: see token_maxima.cu. No torch
// headers.
#pragma once
#include "cuda/types.h"

using cudaStream_t = struct CUstream_st*;

namespace mlip::cuda::contrastive {

// Tokens of one side, [batch, count, channels] with unit stride along channels.
struct TokenSide {
  const void* values;
  int64_t stride_batch, stride_token;  // in elements
  bool vector;                         // whether rows can be read 16 bytes at a time
  const Flag* mask;                    // [batch, count], or null: all are real
  const float* share;                  // [batch, count]
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
  void* best_text;      // [B, C, N], integers of best_text_bytes: 1, 2 or 4
  void* best_image;     // [B, C, M], integers of best_image_bytes
  float* text_maxima;   // [B, C, N]
  float* image_maxima;  // [B, C, M]
  int best_text_bytes, best_image_bytes;

  // How the work is cut: `token_maxima_plan`.
  int texts_per_block;
  int stages;     // pieces of the tokens in flight: 1 or 2
  bool resident;  // whether the image stays in shared memory
  bool held;      // whether 64 tokens of the texts stay there while they meet all tokens of the image
};

constexpr int MOST_TOKENS = 0xffff;  // on each side: places in a list have 16 bits

// Fills in how the work is cut on the current device; false where its shared memory is too small for so many tokens.
bool token_maxima_plan(TokenMaxima& problem);

int64_t token_maxima_blocks(const TokenMaxima& problem);

void token_maxima(const TokenMaxima& problem, cudaStream_t stream);

}  // namespace mlip::cuda::contrastive
