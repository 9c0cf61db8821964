// What the kernels share that take tokens to their spectrum and, most of them, back again: filters and energies.
//
// They work on a block of channels of one batch element at a time, which goes through its stages in the cache:
//
//   rows         x is read once, widened, and transformed along W into a tile [H, parts K, channels]
//   columns      one column at a time: transformed along H, used (weighted, squared, summed), transformed back
//   rows back    y is written once
//
// The maps are orthonormal, so the way back is the transposed map. In the Fourier basis (parts = 2: real, imaginary)
// the coefficients 0 < k < W / 2 stand for their mirror image too and count twice; that factor is part of what the
// spectrum is multiplied with. An imaginary part of DC and Nyquist columns does not come back: their sine is 0.
#pragma once
#include <cstdint>

#include "cpu/spectral/lines.h"
#include "cpu/types.h"

namespace mlip::cpu {

template <typename A>
struct Spectrum {
  static constexpr int64_t BLOCK = 64;  // channels

  bool fourier;
  int64_t height, width;
  Line<A> rows, columns, rows_back, columns_back;  // columns without outputs: nothing happens along columns

  int64_t parts() const { return fourier ? 2 : 1; }
  int64_t points() const { return height * width; }
  int64_t in_a_row() const { return fourier ? width / 2 + 1 : width; }  // coefficients
  int64_t coefficients() const { return height * in_a_row(); }
  A multiplicity(int64_t k) const { return !fourier || k == 0 || 2 * k == width ? A(1) : A(2); }

  // What a thread needs, in elements: the spectrum of a block, a column of it, padded channels, and for a line.
  int64_t tile() const { return parts() * coefficients() * BLOCK; }
  int64_t column() const { return parts() * height * BLOCK; }
  int64_t padded() const { return points() * MOST_LANES<A>; }
  int64_t scratch() const {
    int64_t most = 0;
    for (const Line<A>* line : {&rows, &columns, &rows_back, &columns_back}) {
      most = line->scratch() > most ? line->scratch() : most;
    }
    return tile() + column() + padded() + most;
  }
};

// The problems of the family have these in common. Tokens have unit stride over channels.
template <typename T>
struct SpectralTokens {
  Spectrum<Accumulate<T>> spectrum;
  int64_t batch, channels, prefix;
  const T* x;                          // [B, prefix + H W, D]
  int64_t stride_batch, stride_token;  // of x, in elements

  int64_t tokens() const { return prefix + spectrum.points(); }
  int64_t blocks() const { return (channels + spectrum.BLOCK - 1) / spectrum.BLOCK; }
};

}  // namespace mlip::cpu
