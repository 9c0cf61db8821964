// High-frequency energy at each token: the squares, summed over channels, of P x, where the projection P = S* k S keeps
// the coefficients with k = 1 and drops those with k = 0; and its gradient dx = 2 P (g . P x).
//
//   x [B, prefix + H W, D], kept [H, K] -> energy [B, prefix + H W];   grad [B, prefix + H W] -> dx like x
//
// The forward pass reads x once and writes next to nothing; the backward pass, which filters twice, reads x once and
// writes dx once. A forward task is a segment of channels of one batch element. Its sums over channels are partial
// results, added in order: the cut depends on the shape alone, so the result is the same for any number of threads. A
// backward task is a block of channels of one batch element.
#pragma once
#include <cstdint>

#include "cpu/spectral/spectrum.h"

namespace mlip::cpu {

template <typename T>
struct TokenEnergy : SpectralTokens<T> {
  static constexpr int64_t SEGMENT = 4;  // blocks of channels

  const Accumulate<T>* kept;  // [H, K]

  Accumulate<T>* partial;     // [B, segments, H W], written forward
  Accumulate<T>* energy;      // [B, prefix + H W], written forward
  const Accumulate<T>* grad;  // [B, prefix + H W], read backward
  T* grad_x;                  // [B, prefix + H W, D], contiguous, written backward

  int64_t segments() const { return (this->blocks() + SEGMENT - 1) / SEGMENT; }
  int64_t forward_tasks() const { return this->batch * segments(); }
  int64_t backward_tasks() const { return this->batch * this->blocks(); }
  int64_t scratch() const {
    const Spectrum<Accumulate<T>>& s = this->spectrum;
    return s.scratch() + s.coefficients() + s.width * BLOCK_CHANNELS + s.points() * MOST_LANES<Accumulate<T>>;
  }
};

// Over forward tasks: fills partial.
template <typename T>
void token_energy_sums(const TokenEnergy<T>& problem, int64_t begin, int64_t end);

// Over batch elements: fills energy from the partial sums.
template <typename T>
void token_energy_finish(const TokenEnergy<T>& problem, int64_t begin, int64_t end);

// Over backward tasks.
template <typename T>
void token_energy_backward(const TokenEnergy<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
