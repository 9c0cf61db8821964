// Size-weighted mean over tokens: y_b = sum_n w_bn x_bn / W_b with W_b = sum_n w_bn.
//
// The work is cut into tasks: segments of at most SEGMENT tokens of one batch element. The cut depends on the shape
// alone, and the partial results of the segments are added in order, so the result is the same for any number of
// threads. Callers run every function over its whole range, in any order and on any threads.
//
//   forward             reads x once: B N D elements, and writes B D
//   backward            writes dx once: B N D elements, and reads g: B D
//   backward_weight     reads x once: B N D elements, and writes dw: B N
// All three are bound by memory: 2 flops per element.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace mlip::cpu {

// Tensors are contiguous, except that x may have any strides over batch and tokens.
template <typename T>
struct WeightedMean {
  static constexpr int64_t SEGMENT = 256;

  int64_t batch, tokens, channels;
  int64_t prefix;  // leading tokens that take no part

  // Read:
  const T* x;                          // [B, N, D]
  int64_t stride_batch, stride_token;  // of x, in elements
  const Accumulate<T>* weight;         // [B, N], or null: every token weighs 1
  const T* grad;                       // [B, D]
  const Accumulate<T>* known_total;    // [B] W_b, as the forward pass left it

  // Written:
  Accumulate<T>* partial;        // [tasks, D]  sum of w x over the segment
  Accumulate<T>* partial_total;  // [tasks]     sum of w over the segment
  T* mean;                       // [B, D]
  Accumulate<T>* total;          // [B]         W_b
  T* grad_x;                     // [B, N, D]
  Accumulate<T>* grad_weight;    // [B, N]

  int64_t segments() const { return (tokens - prefix + SEGMENT - 1) / SEGMENT; }
  int64_t tasks() const { return batch * segments(); }
  int64_t first_token(int64_t segment) const { return prefix + segment * SEGMENT; }
  int64_t last_token(int64_t segment) const {
    return first_token(segment) + SEGMENT < tokens ? first_token(segment) + SEGMENT : tokens;
  }
};

// Forward, over tasks: fills partial and partial_total. Where a batch element is one segment, also mean and total.
template <typename T>
void weighted_mean_sums(const WeightedMean<T>& problem, int64_t begin, int64_t end);

// Forward, over batch elements of more than one segment: fills mean and total from the partial sums.
template <typename T>
void weighted_mean_finish(const WeightedMean<T>& problem, int64_t begin, int64_t end);

// Backward, over tasks: grad_x = w / W grad, 0 for the prefix and where W is 0.
template <typename T>
void weighted_mean_backward(const WeightedMean<T>& problem, int64_t begin, int64_t end);

// Backward of the weight, over tasks: grad_weight = <grad_b, x_bn>.
template <typename T>
void weighted_mean_products(const WeightedMean<T>& problem, int64_t begin, int64_t end);

// Backward of the weight, over batch elements: turns the products into grad_weight = <grad_b, x_bn - y_b> / W_b.
template <typename T>
void weighted_mean_centre(const WeightedMean<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
