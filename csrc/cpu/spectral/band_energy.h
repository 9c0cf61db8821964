// Energy of tokens by frequency band: e_bj = sum of m_k |S x_b|_k^2 over the coefficients k of band j, per channel,
// where m_k counts mirror images, and its gradient dx = S* (2 m_k g_bj . S x_b).
//
//   x [B, prefix + H W, D], bands [coefficients] -> energy [B, bands, D];   grad [B, bands, D] -> dx like x
//
// The forward pass reads x once and writes next to nothing, the backward pass reads x once (the spectrum is computed
// again) and writes dx once. A task is a block of channels of one batch element. Half or all of the multiplications of
// the filter (cpu/spectral/filtered.h). A coefficient whose band is not one of 0 .. bands - 1 counts in none.
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

  int64_t tasks() const { return this->batch * this->blocks(); }
  int64_t scratch() const { return this->spectrum.scratch() + count * BLOCK_CHANNELS; }
};

// Over tasks.
template <typename T>
void band_energy(const BandEnergy<T>& problem, int64_t begin, int64_t end);
template <typename T>
void band_energy_backward(const BandEnergy<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
