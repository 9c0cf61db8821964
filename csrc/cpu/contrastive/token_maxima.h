// Token logits: means of the highest similarity of every token, for every pair of an image b and a text c, in both
// directions:
//
//   per_image[b, c] = sum_n w_bn max_m <v_bn, t_cm>        per_text[c, b] = sum_m u_cm max_n <v_bn, t_cm>
//
// and the argmax of each (the first of equals), over valid tokens, which no mask excludes. w and u are normalized
// weights: those of an image or text add up to 1.
//
// The product of the tokens is 2 B C N M D flops and bounds the time; its B C N M similarities never leave the caches.
// They are computed in tiles: a few images (rows) times a few texts (columns), small enough for the second-level cache,
// by a micro-kernel that keeps up to 14 x 2 vectors of similarities in registers and sweeps over D. Each tile is then
// reduced along both axes. Read: the tokens, the texts once per few images, from cache. Written: 8 bytes per pair, one
// (or two, four) per pair and token for the argmax, and 4 (8 for double) per pair and token for the maxima, if wanted.
//
// Masked tokens cost nothing: valid ones are packed side by side, columns of one text right behind those of the one
// before it, so padding is at most one vector per tile.
//
// Every pair is computed by one thread and in the same order however the tiles fall, so the bits do not depend on the
// number of threads, on the batch around a pair, or on how much of a text is masked padding.
//
// Backward: the gradient of the tokens of one side,
//
//   dv_bn = sum_c  grad_mean[b, c] w_bn other_c[argmax_other_bcn]
//                + grad_other_mean[c, b] sum_{m : argmax_bcm = n} u_cm other_cm
//
// without terms in which either token is masked: a masked argmax means that there was none. For the images the other
// side are the texts; for the texts the two change places, and the argmax is read with its strides.
//
// It is sparse: at most 2 B C (N + M) D flops instead of the 2 B C N M D of a product with dense coefficients, which
// are never formed; two tokens that are each other's argmax take one term for both. It is bound by reading one token,
// from the second-level cache, for every term. So the terms of an image with a few texts, whose tokens fit that cache,
// are listed by destination; then each destination reads the tokens of its list, a slice of channels at a time, with
// its sums in registers.
//
// Where AVX-512 widens, multiplies and adds 16 channels in half a cycle, reading them takes 0.9, and a list costs 5
// cycles a term: over a quarter of the time for 256 channels. For both sides that is about (N + M) (10 + 0.1 D) cycles
// a pair. A bfloat16 product of all tokens takes N M D / 64, of which this is about a half for 49 x 32 tokens of 256
// channels and a quarter for 49 x 77 of 512. A block that fits the first-level cache reads faster, but its lists are
// too short to gain by it.
//
// Each row is written by one thread, which adds the terms of each few texts, then their sums, in an order that follows
// from the shapes alone: the bits do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/simd.h"

namespace mlip::cpu {

// Tokens of one side: of B images or C texts. Values have unit stride along channels.
template <typename T>
struct Tokens {
  int64_t batch, count;
  const T* values;                         // [batch, count, D]
  int64_t stride_batch, stride_token;      // in elements
  const Flag* mask;                        // [batch, count], or null: all are valid
  const Accumulate<T>* normalized_weight;  // [batch, count]
};

// Results of the forward pass, accumulated in A. The last four may be null.
template <typename A>
struct TokenMaximaResults {
  A* per_image;        // [B, C]
  A* per_text;         // [C, B]
  void* argmax_text;   // [B, C, N], integers of argmax_text_bytes: 1, 2 or 4
  void* argmax_image;  // [B, C, M], integers of argmax_image_bytes
  A* text_maxima;      // [B, C, N]
  A* image_maxima;     // [B, C, M]
  int argmax_text_bytes, argmax_image_bytes;
};

template <typename T>
struct TokenMaxima {
  int64_t channels;
  Tokens<T> images, texts;
  TokenMaximaResults<Accumulate<T>> results;
};

// Consecutive images or texts that share a tile.
struct TokenGroup {
  int64_t first, last;    // which
  int64_t start, length;  // their rows or columns, counted from those of the block; columns are whole vectors
};

// One block of work: all images x one packed group of texts.
struct TokenMaximaBlock {
  const TokenGroup *images, *texts;
  int64_t image_groups, text_groups;
  int64_t tasks() const { return image_groups * text_groups; }
};

// Valid tokens of image or text i are those at first[i] <= k < first[i + 1]; index[k] is the index of the token among
// the `count` of i.
struct ValidTokens {
  int64_t batch, count;
  const int64_t* first;
  const int32_t* index;

  int64_t of(int64_t i) const { return first[i + 1] - first[i]; }
};

// The part of the tiling that kernels read.
struct TokenMaximaTiles {
  ValidTokens images, texts;
  int64_t most_images, most_rows;  // in a group of images
  int64_t most_columns;            // in a group of texts
};

// How the work is cut, which does not depend on the number of threads.
struct TokenMaximaTiling {
  TokenMaximaTiles tiles;
  std::vector<int64_t> image_first, text_first;  // see ValidTokens
  std::vector<int32_t> image_index, text_index;
  std::vector<TokenGroup> image_groups, text_groups;
  std::vector<TokenMaximaBlock> blocks;
  int64_t lanes, steps, element_bytes;  // of packed operands: see similarity_tile_kernels.h
  int64_t most_columns_a_block;

  // Elements of packed texts, and behind them the weights of their tokens.
  int64_t packed_elements() const { return most_columns_a_block * steps; }
  int64_t packed_bytes() const { return (packed_elements() + most_columns_a_block + lanes) * element_bytes; }
  int64_t scratch_bytes() const;  // of one thread
};

template <typename T>
TokenMaximaTiling token_maxima_tiling(const TokenMaxima<T>& problem);

// Over the groups of texts of a block: packs their valid tokens into `packed`, of tiling.packed_bytes().
template <typename T>
void token_maxima_pack(const TokenMaxima<T>& problem, const TokenMaximaTiling& tiling, const TokenMaximaBlock& block,
                       void* packed, int64_t begin, int64_t end);

// Over the tasks of a block that has been packed.
template <typename T>
void token_maxima(const TokenMaxima<T>& problem, const TokenMaximaTiling& tiling, const TokenMaximaBlock& block,
                  const void* packed, int64_t begin, int64_t end);

// One of the two argmax tensors: integers of 1, 2 or 4 bytes, [b, c, token] with unit stride along tokens.
struct ArgmaxIndices {
  const void* values;
  int bytes;
  int64_t stride_b, stride_c;
};

// All but the tokens themselves, accumulated in A.
template <typename A>
struct TokenMaximaGradients {
  int64_t batch, count, other_batch, other_count, channels;  // B, N, C, M, D

  const A* grad_mean;             // [B, C]
  const A* grad_other_mean;       // [C, B]
  const Flag *mask, *other_mask;  // [B, N] and [C, M], or null: all are valid
  const A *normalized_weight, *other_normalized_weight;
  ArgmaxIndices argmax_other;  // for each of the N tokens, one of M
  ArgmaxIndices argmax;        // for each of the M tokens, one of N
};

template <typename T>
struct TokenMaximaBackward : TokenMaximaGradients<Accumulate<T>> {
  const T* others;  // [C, M, D]
  T* grad;          // [B, N, D], written

  // Channels of a slice: as many sums as the registers hold beside what they add.
  static constexpr int64_t SLICE = 128;
  int64_t slices() const { return (this->channels + SLICE - 1) / SLICE; }
  int64_t tasks() const { return this->batch * slices(); }
};

// Over tasks: slices of the channels of each b. A thread should get whole b, or their lists are made more than once.
template <typename T>
void token_maxima_backward(const TokenMaximaBackward<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
