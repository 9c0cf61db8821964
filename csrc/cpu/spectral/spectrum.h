// What the kernels share that take tokens to their spectrum and, most of them, back again: filters and energies.
//
// They work on a block of channels of one batch element at a time, which goes through its stages in the cache:
//
//   rows         x is read once, widened, and transformed along W into a tile [H, W, channels]
//   columns      one column of the spectrum at a time: transformed along H, used (weighted, squared), transformed back
//   rows back    y is written once
//
// The maps are orthonormal, so the way back is the transposed map. In the Fourier basis the tile holds cosines and
// sines of rows, and real transforms along columns make cosines and sines of both (cc, cs: a cosine along H of a cosine
// or sine along W, ...). Coefficients of rows l and H - l of the spectrum are made of the same four numbers,
//
//   Z[l, k] = (cc - ss) + i (sc + cs)      Z[H - l, k] = (cc + ss) + i (cs - sc)
//
// without sines where l or k is its own mirror image (DC and Nyquist), which is also why an imaginary part does not
// come back from there. The coefficients 0 < k < W / 2 stand for their mirror image too and count twice; that factor is
// part of what the spectrum is multiplied with.
#pragma once
#include <cstdint>

#include "cpu/spectral/fourier_line.h"
#include "cpu/types.h"

namespace mlip::cpu {

template <typename A>
struct Spectrum {
  bool fourier;
  int64_t height, width;
  bool along_columns;                              // otherwise nothing happens along columns
  FourierLine<A> fourier_rows, fourier_columns;    // Fourier basis
  Line<A> rows, columns, rows_back, columns_back;  // cosine basis

  int64_t parts() const { return fourier ? 2 : 1; }
  int64_t points() const { return height * width; }
  int64_t in_a_row() const { return fourier ? width / 2 + 1 : width; }  // coefficients
  int64_t coefficients() const { return height * in_a_row(); }
  A multiplicity(int64_t k) const { return !fourier || k == 0 || 2 * k == width ? A(1) : A(2); }

  // What a thread needs, in elements: for a block, for a column of its spectrum, for padded channels, for a line.
  int64_t tile() const { return height * (width * BLOCK_CHANNELS + MOST_LANES<A>); }
  int64_t column() const { return parts() * height * BLOCK_CHANNELS; }
  int64_t padded() const {
    const int64_t channels = points() * MOST_LANES<A>, streamed_row = width * BLOCK_CHANNELS;
    return channels > streamed_row ? channels : streamed_row;
  }
  int64_t scratch() const {
    int64_t most = 0;
    for (const int64_t line : {rows.scratch(), columns.scratch(), rows_back.scratch(), columns_back.scratch(),
                               fourier_rows.scratch(), fourier_columns.scratch()}) {
      most = line > most ? line : most;
    }
    return tile() + column() + padded() + most;
  }
  // A number per part of each coefficient of a block.
  int64_t factors() const { return parts() * coefficients() * BLOCK_CHANNELS; }
};

// The problems of the family have these in common. Tokens have unit stride over channels.
template <typename T>
struct SpectralTokens {
  Spectrum<Accumulate<T>> spectrum;
  int64_t batch, channels, prefix;
  const T* x;                          // [B, prefix + H W, D]
  int64_t stride_batch, stride_token;  // of x, in elements

  int64_t tokens() const { return prefix + spectrum.points(); }
  // Whether the output y [B, prefix + H W, D] is to go past the caches.
  bool streamed(const T* y) const { return can_stream(y, batch * tokens(), channels); }
  // The first point of a block of a batch element, behind the prefix, for tasks batch * blocks() + block.
  const T* start(int64_t task) const {
    return x + task / blocks() * stride_batch + prefix * stride_token + task % blocks() * BLOCK_CHANNELS;
  }
  int64_t blocks() const { return (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS; }  // of channels
};

}  // namespace mlip::cpu
