// Means of the best similarity of every token, for every pair of an image b and a text c, in both directions:
//
//   per_image[b, c] = sum_n share_bn max_m <v_bn, t_cm>        per_text[c, b] = sum_m share_cm max_n <v_bn, t_cm>
//
// and the token that is best for each (the first of equals), over tokens that are not masked.
//
// The product of the tokens is 2 B C N M D flops and bounds the time; its B C N M similarities never leave the caches.
// They are computed in tiles: a few images (rows) times a few texts (columns), small enough for the second-level cache,
// by a micro-kernel that keeps up to 14 x 2 vectors of similarities in registers and sweeps over D. Each tile is then
// reduced along both axes. Read: the tokens, the texts once per few images, from cache. Written: 8 bytes per pair, one
// (or two, four) per pair and token for the maps, and 4 (8 for double) per pair and token for the maxima, if wanted.
//
// Masked tokens cost nothing: the real ones are packed side by side, columns of one text right behind those of the one
// before it, so padding is at most one vector per tile.
//
// Every pair is computed by one thread and in the same order however the tiles fall, so the bits do not depend on the
// number of threads, on the batch around a pair, or on how much of a text is masked padding.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/simd.h"

namespace mlip::cpu {

// Tokens of one side: of B images or C texts. Values have unit stride along channels.
template <typename T>
struct Tokens {
  int64_t batch, count;
  const T* values;                     // [batch, count, D]
  int64_t stride_batch, stride_token;  // in elements
  const Flag* mask;                    // [batch, count], or null: all are real
  const Accumulate<T>* share;          // [batch, count]
};

template <typename T>
struct TokenMaxima {
  int64_t channels;
  Tokens<T> images, texts;

  // Written; the last four may be null.
  Accumulate<T>* per_image;     // [B, C]
  Accumulate<T>* per_text;      // [C, B]
  void* best_text;              // [B, C, N], integers of best_text_bytes: 1, 2 or 4
  void* best_image;             // [B, C, M], integers of best_image_bytes
  Accumulate<T>* text_maxima;   // [B, C, N]
  Accumulate<T>* image_maxima;  // [B, C, M]
  int best_text_bytes, best_image_bytes;
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

// Real tokens of image or text i are those at first[i] <= k < first[i + 1]; place[k] is the token's index in it.
struct TokenPlaces {
  const int64_t* first;
  const int32_t* place;
};

// What the kernels are told of the plan.
struct TokenMaximaCut {
  TokenPlaces images, texts;
  int64_t most_images, most_rows;  // in a group of images
  int64_t most_columns;            // in a group of texts
};

// How the work is cut. The cut does not depend on the number of threads.
struct TokenMaximaPlan {
  std::vector<int64_t> image_first, text_first;  // see TokenPlaces
  std::vector<int32_t> image_place, text_place;
  std::vector<TokenGroup> image_groups, text_groups;
  std::vector<TokenMaximaBlock> blocks;
  int64_t lanes, steps, element_bytes;  // of packed operands: see operands_kernels.h
  int64_t most_images, most_rows, most_columns, most_columns_a_block;

  TokenMaximaCut cut() const {
    return {{image_first.data(), image_place.data()},
            {text_first.data(), text_place.data()},
            most_images,
            most_rows,
            most_columns};
  }
  // Elements of packed texts, and behind them the shares of their tokens.
  int64_t packed_elements() const { return most_columns_a_block * steps; }
  int64_t packed_bytes() const { return (packed_elements() + most_columns_a_block + lanes) * element_bytes; }
  int64_t scratch_bytes() const;  // of one thread
};

template <typename T>
TokenMaximaPlan token_maxima_plan(const TokenMaxima<T>& problem);

// Over the groups of texts of a block: packs their real tokens into `packed`, of plan.packed_bytes().
template <typename T>
void token_maxima_pack(const TokenMaxima<T>& problem, const TokenMaximaPlan& plan, const TokenMaximaBlock& block,
                       void* packed, int64_t begin, int64_t end);

// Over the tasks of a block that has been packed.
template <typename T>
void token_maxima(const TokenMaxima<T>& problem, const TokenMaximaPlan& plan, const TokenMaximaBlock& block,
                  const void* packed, int64_t begin, int64_t end);

}  // namespace mlip::cpu
