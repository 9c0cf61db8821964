// Real tokens from half a Fourier spectrum: X = (M_h Z) S_w^T for every channel; and adjoints of analyses.
//
//   real, imaginary [B, H, K, D] -> y [B, prefix + H' W', D],   along_h [2, H', H]: real and imaginary part, or empty,
//   along_w [W', 2 K]: the columns of real, then those of imaginary parts; the prefix is 0
//
// Reads the spectrum once and writes y once: B D (2 H K + prefix + H' W') elements. Between them columns, then rows are
// transformed in a tile [H', 2 K, block of channels] of the accumulation type, which stays in cache. A task is a block
// of channels of one batch element.
#pragma once
#include <cstdint>

#include "cpu/spectral/lines.h"
#include "cpu/types.h"

namespace mlip::cpu {

// y is contiguous; the spectrum may have any strides but over channels, the same for both parts.
template <typename T>
struct Synthesis {
  int64_t batch, height, kept, channels, prefix;
  Line<Accumulate<T>> along_h, along_w;  // along_h complex; without outputs, nothing happens along columns

  const T *real, *imaginary;
  int64_t stride_batch, stride_row, stride_coefficient;  // of both, in elements
  T* y;

  int64_t new_height() const { return along_h.outputs ? along_h.outputs / 2 : height; }
  int64_t new_tokens() const { return prefix + new_height() * along_w.outputs; }
  int64_t channel_blocks() const { return (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS; }
  int64_t tasks() const { return batch * channel_blocks(); }
  bool streamable() const { return can_stream(y, batch * new_tokens(), channels); }

  // What a thread needs, in elements of the accumulation type: for a line, for the tile, for padded spectrum and y.
  int64_t line_scratch() const {
    const int64_t lines = along_w.streaming_scratch(), columns = along_h.scratch();
    return lines > columns ? lines : columns;
  }
  int64_t tile() const { return along_h.outputs ? new_height() * 2 * kept * BLOCK_CHANNELS : 0; }
  int64_t padded() const {
    return channels % BLOCK_CHANNELS ? (2 * height * kept + new_tokens()) * MOST_LANES<Accumulate<T>> : 0;
  }
  int64_t scratch() const { return line_scratch() + tile() + padded(); }
};

// Over tasks.
template <typename T>
void synthesis(const Synthesis<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
