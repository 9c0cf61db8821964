// Gradient of the weight of the spectral filter (cpu/spectral/filtered.h): dw = sum_b conj(S x_b) . S g_b, twice that
// for coefficients that stand for their mirror image too.
//
//   g, x [B, prefix + H W, D] -> dw [H, W, D] (cosine basis) or [H, K, D, 2] (Fourier basis)
//
// Reads g and x once; the sum stays in the cache. As many multiplications as the filter itself. A task is a block of
// channels of a segment of the batch. The cut depends on the shape alone, and the sums of segments are added in order:
// the result is the same for any number of threads, and rounding grows with the segment rather than with the batch.
#pragma once
#include <cstdint>

#include "cpu/spectral/spectrum.h"

namespace mlip::cpu {

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

// Over tasks: fills partial.
template <typename T>
void filtered_backward_weight_sums(const FilteredBackwardWeight<T>& problem, int64_t begin, int64_t end);

// Over elements of the weight: fills grad_weight from the partial sums.
template <typename T>
void filtered_backward_weight_finish(const FilteredBackwardWeight<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
