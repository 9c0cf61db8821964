// Spectral filter of tokens: y = S* (w . S x) with an orthonormal transform S, a weight per coefficient and channel.
//
//   x [B, prefix + H W, D] -> y,   w [H, W, D] (cosine basis) or [H, K, D, 2] (Fourier basis), K = W / 2 + 1
//
// Reads x once and writes y once; between them everything stays in the cache. A task is a block of channels of one
// batch element, blocks outside: the block of the weight, unpacked once, serves all batch elements of a thread.
// Multiplications per element in the Fourier basis, by the side of the grid: 17 at 7, 17 at 14, 13 at 16, 19 at 24, and
// as many additions. That is about what the memory takes to deliver and fetch it; moving numbers between registers and
// the first level cache takes longer than either.
#pragma once
#include <cstdint>

#include "cpu/spectral/spectrum.h"

namespace mlip::cpu {

template <typename T>
struct Filtered : SpectralTokens<T> {
  const Accumulate<T>* weight;  // contiguous
  T* y;                         // contiguous

  int64_t tasks() const { return this->batch * this->blocks(); }
  int64_t scratch() const { return this->spectrum.scratch() + this->spectrum.factors(); }
};

// Over tasks.
template <typename T>
void filtered(const Filtered<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
