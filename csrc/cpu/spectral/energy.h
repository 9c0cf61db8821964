// Energies of tokens by frequency, with gradients.
//
//   band energy   e_bj = sum of m_k |S x_b|_k^2 over the coefficients k of band j, per channel, where m_k counts mirror
//                 images; dx = S* (2 m_k g_bj . S x_b). A coefficient whose band is not one of 0 .. bands - 1 counts in
//                 none.
//                 x [B, prefix + H W, D], bands [coefficients] -> energy [B, bands, D];   grad [B, bands, D] -> dx
//   token energy  high-frequency energy at each token: the squares, summed over channels, of P x, where the projection
//                 P = S* m S keeps the coefficients whose frequency_mask m is 1 and drops those where it is 0;
//                 dx = 2 P (g . P x).
//                 x [B, prefix + H W, D], m [H, K] -> energy [B, prefix + H W];   grad [B, prefix + H W] -> dx
//
// The forward passes read x once and write next to nothing; the backward passes read x once (the spectrum is computed
// again) and write dx once. Half or all of the multiplications of the filter (cpu/spectral/filter.h), twice that for the
// gradient of token energy. A task is a block of channels of one batch element; but a forward task of token energy is a
// segment of channels of one batch element. Its sums over channels are partial results, added in order: the cut depends
// on the shape alone, so the result is the same for any number of threads.
#pragma once
#include <cstdint>

#include "cpu/spectral/spectrum.h"

namespace mlip::cpu {

template <typename T>
struct BandEnergy : SpectralTokens<T> {
  const int32_t* bands;  // [H, K]
  int64_t count;         // bands

  T* energy;      // [B, count, D], written forward
  const T* grad;  // [B, count, D], read backward
  T* grad_x;      // [B, prefix + H W, D], contiguous, written backward

  int64_t scratch() const { return this->spectrum.scratch() + count * BLOCK_CHANNELS; }
};

// Over tasks.
template <typename T>
void band_energy(const BandEnergy<T>& problem, int64_t begin, int64_t end);
template <typename T>
void band_energy_backward(const BandEnergy<T>& problem, int64_t begin, int64_t end);

template <typename T>
struct TokenEnergy : SpectralTokens<T> {
  static constexpr int64_t SEGMENT = 4;  // blocks of channels

  const Accumulate<T>* frequency_mask;  // [H, K]

  Accumulate<T>* partial;     // [B, segments, H W], written forward
  Accumulate<T>* energy;      // [B, prefix + H W], written forward
  const Accumulate<T>* grad;  // [B, prefix + H W], read backward
  T* grad_x;                  // [B, prefix + H W, D], contiguous, written backward

  int64_t segments() const { return (this->blocks() + SEGMENT - 1) / SEGMENT; }
  int64_t forward_tasks() const { return this->batch * segments(); }
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

// Over tasks.
template <typename T>
void token_energy_backward(const TokenEnergy<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
