// Spectral filter of tokens, y = S* (w . S x) with an orthonormal transform S and a weight per coefficient and channel,
// and the gradient of its weight, dw = sum_b conj(S x_b) . S g_b, twice that for coefficients that stand for their
// mirror image too. (The gradient of x is the filter with the conjugate weight.)
//
//   x, y, g [B, prefix + H W, D],   w, dw [H, W, D] (cosine basis) or [H, K, D, 2] (Fourier basis), K = W / 2 + 1
//
// The filter reads x once and writes y once; between them everything stays in the cache. Its task is a block of channels
// of one batch element, blocks outside: the block of the weight, unpacked once, serves all batch elements of a thread.
// Multiplications per element in the Fourier basis, by the side of the grid: 17 at 7, 17 at 14, 13 at 16, 19 at 24, and
// as many additions. That is about what the memory takes to deliver and fetch it; moving numbers between registers and
// the first level cache takes longer than either.
//
// The gradient reads g and x once and has as many multiplications; the sum stays in the cache. Its task is a block of
// channels of a segment of the batch. The cut depends on the shape alone, and the sums of segments are added in order:
// the result is the same for any number of threads, and rounding grows with the segment rather than with the batch.
#pragma once
#include <cstdint>

#include "cpu/spectral/spectrum.h"

namespace mlip::cpu {

template <typename T>
struct Filtered : SpectralTokens<T> {
  const Accumulate<T>* weight;  // contiguous
  T* y;                         // contiguous

  int64_t scratch() const { return this->spectrum.scratch() + this->spectrum.factors(); }
};

template <typename T>
struct FilteredBackwardWeight : SpectralTokens<T> {
  static constexpr int64_t SEGMENT = 32;  // batch elements

  const T* grad;                                 // [B, prefix + H W, D]
  int64_t grad_stride_batch, grad_stride_token;  // in elements
  Accumulate<T>* partial;                        // [segments, coefficients, D, parts]
  Accumulate<T>* grad_weight;                    // [coefficients, D, parts]; may be `partial` where that is one segment

  int64_t segments() const { return (this->batch + SEGMENT - 1) / SEGMENT; }
  int64_t tasks() const { return this->blocks() * segments(); }
  int64_t elements() const {
    return this->spectrum.coefficients() * this->channels * this->spectrum.parts();  // of the weight
  }
  int64_t scratch() const { return 2 * this->spectrum.scratch() + this->spectrum.factors(); }
};

// Over tasks.
template <typename T>
void filtered(const Filtered<T>& problem, int64_t begin, int64_t end);

// Over tasks: fills partial.
template <typename T>
void filtered_backward_weight_sums(const FilteredBackwardWeight<T>& problem, int64_t begin, int64_t end);

// Over elements of the weight: fills grad_weight from the partial sums.
template <typename T>
void filtered_backward_weight_finish(const FilteredBackwardWeight<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
