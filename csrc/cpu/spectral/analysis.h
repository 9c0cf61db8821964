// Real Fourier analysis of tokens on a grid: Z = M_h (X R_w^T) for every channel, complex; and adjoints of syntheses.
//
//   x [B, prefix + H W, D] -> real, imaginary [B, H', K, D],   along_w [2 K, W]: the rows of real, then those of
//   imaginary parts,   along_h [2, H', H]: real and imaginary part, or empty
//
// Reads x once and writes the spectrum once: B D (H W + 2 H' K) elements. Between them rows, then columns are
// transformed in a tile [H, 2 K, block of channels] of the accumulation type, which stays in cache. A task is a block
// of channels of one batch element. The mirror n -> N - n halves both axes (cpu/spectral/lines.h), and evaluating half
// of the spectrum halves the columns once more.
#pragma once
#include <cstdint>

#include "cpu/spectral/lines.h"
#include "cpu/types.h"

namespace mlip::cpu {

// The spectrum is contiguous; x may have any strides over batch and tokens.
template <typename T>
struct Analysis {
  int64_t batch, height, width, channels, prefix;
  Line<Accumulate<T>> along_h, along_w;  // along_h complex; without outputs, nothing happens along columns

  const T* x;
  int64_t stride_batch, stride_token;  // of x, in elements
  T *real, *imaginary;

  int64_t kept() const { return along_w.outputs / 2; }
  int64_t new_height() const { return along_h.outputs ? along_h.outputs / 2 : height; }
  int64_t points() const { return height * width; }
  int64_t coefficients() const { return new_height() * kept(); }
  int64_t channel_blocks() const { return (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS; }
  int64_t tasks() const { return batch * channel_blocks(); }
  bool streamable() const {
    return can_stream(real, batch * coefficients(), channels) &&
           can_stream(imaginary, batch * coefficients(), channels);
  }

  // What a thread needs, in elements of the accumulation type: for a line, for the tile, for padded x and spectrum.
  int64_t line_scratch() const {
    const int64_t lines = along_w.scratch(), columns = along_h.streaming_scratch();
    return lines > columns ? lines : columns;
  }
  int64_t tile() const { return along_h.outputs ? height * along_w.outputs * BLOCK_CHANNELS : 0; }
  int64_t padded() const {
    return channels % BLOCK_CHANNELS ? (points() + 2 * coefficients()) * MOST_LANES<Accumulate<T>> : 0;
  }
  int64_t scratch() const { return line_scratch() + tile() + padded(); }
};

// Over tasks.
template <typename T>
void analysis(const Analysis<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
