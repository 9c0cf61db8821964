// Separable transform of tokens on a grid: Y = A_h X A_w^T for every channel, the DCTs, their inverses, resizing.
//
//   x [B, prefix + H W, D] -> y [B, prefix + H' W', D],   along_w [W', W],   along_h [H', H] or empty
//
// Reads x once and writes y once: B D (2 prefix + H W + H' W') elements. Between them rows, then columns are
// transformed in a tile [H, W', block of channels] of the accumulation type, which stays in cache. A task is a block of
// channels of one batch element.
//
// Multiplications are those of cpu/spectral/lines.h, 10.6 an element for the DCT of 14 x 14, and take about as long as
// memory takes to deliver x and to accept y. So that the two overlap, the x of the next task is fetched while columns
// are computed; and large results go past the caches, as reading every line of y before writing it would cost as much
// as reading x.
#pragma once
#include <cstdint>

#include "cpu/spectral/lines.h"
#include "cpu/types.h"

namespace mlip::cpu {

// y is contiguous; x may have any strides over batch and tokens.
template <typename T>
struct Separable {
  int64_t batch, height, width, channels, prefix;
  Line<Accumulate<T>> along_h, along_w;  // along_h without outputs: nothing happens along columns

  const T* x;
  int64_t stride_batch, stride_token;  // of x, in elements
  T* y;

  int64_t new_height() const { return along_h.outputs ? along_h.outputs : height; }
  int64_t tokens() const { return prefix + height * width; }
  int64_t new_tokens() const { return prefix + new_height() * along_w.outputs; }
  int64_t channel_blocks() const { return (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS; }
  int64_t tasks() const { return batch * channel_blocks(); }

  bool streamable() const { return can_stream(y, batch * new_tokens(), channels); }

  // What a thread needs, in elements of the accumulation type: for a line, for the tile, for padded x and y.
  int64_t line_scratch() const {
    const int64_t lines = along_w.scratch(), columns = along_h.streaming_scratch();
    return lines > columns ? lines : columns;
  }
  int64_t tile() const { return along_h.outputs ? height * along_w.outputs * BLOCK_CHANNELS : 0; }
  int64_t padded() const {
    return channels % BLOCK_CHANNELS ? (tokens() + new_tokens()) * MOST_LANES<Accumulate<T>> : 0;
  }
  int64_t scratch() const { return line_scratch() + tile() + padded(); }
};

// Over tasks.
template <typename T>
void separable(const Separable<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
