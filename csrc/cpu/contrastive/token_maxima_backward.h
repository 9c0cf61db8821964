// Gradient of the tokens of one side from the means of the best similarities (token_maxima.h):
//
//   dv_bn = sum_c  grad_mean[b, c] share_bn other_c[best_other_bcn]
//                + grad_other_mean[c, b] sum_{m : best_bcm = n} other_share_cm other_cm
//
// without terms in which either token is masked: a winner that is masked means that there was none. For the images the
// other side are the texts; for the texts the two change places, and the maps are read with their strides.
//
// It is sparse: at most 2 B C (N + M) D flops instead of the 2 B C N M D of a product with dense coefficients, which
// are never formed; two tokens that are each other's best take one term for both. What bounds it is reading one token,
// from the second-level cache, for every term. So the terms of an image with a few texts, whose tokens fit that cache,
// are listed by destination; then each destination reads the tokens of its list, a slice of channels at a time, with
// its sums in registers.
//
// Where AVX-512 widens, multiplies and adds 16 channels in half a cycle, reading them takes 0.9, and a list costs 5
// cycles a term: over a quarter of the time for 256 channels. For both sides that is about (N + M) (10 + 0.1 D) cycles
// a pair. A bfloat16 product of all tokens takes N M D / 64, of which this is about a half for 49 x 32 tokens of 256
// channels and a quarter for 49 x 77 of 512. A block that fits the first-level cache reads faster, but its lists are
// too short to gain by it.
//
// Each row is written by one thread, which adds the terms of each few texts, then their sums, in an order that follows
// from the shapes alone: the bits do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace mlip::cpu {

// One of the two maps: integers of 1, 2 or 4 bytes, [b, c, token] with unit stride along tokens.
struct TokenMap {
  const void* values;
  int bytes;
  int64_t stride_b, stride_c;
};

template <typename T>
struct TokenMaximaBackward {
  int64_t batch, count, other_batch, other_count, channels;  // B, N, C, M, D

  // Read:
  const Accumulate<T>* grad_mean;        // [B, C]
  const Accumulate<T>* grad_other_mean;  // [C, B]
  const T* others;                       // [C, M, D]
  const Flag *mask, *other_mask;         // [B, N] and [C, M], or null: all are real
  const Accumulate<T>*share, *other_share;
  TokenMap best_other;  // for each of the N tokens, one of M
  TokenMap best;        // for each of the M tokens, one of N

  // Written:
  T* grad;  // [B, N, D]

  // Channels of a slice: as many sums as the registers hold beside what they add.
  static constexpr int64_t SLICE = 128;
  int64_t slices() const { return (channels + SLICE - 1) / SLICE; }
  int64_t tasks() const { return batch * slices(); }
};

// Over tasks: slices of the channels of each b. A thread should get whole b, or their lists are made more than once.
template <typename T>
void token_maxima_backward(const TokenMaximaBackward<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
