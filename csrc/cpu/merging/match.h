// Bipartite matching of tokens: every token at an even position proposes to merge into the token at an odd position
// with the highest cosine, and the r best proposals are carried out. S sources, T targets, S, T ~ N / 2, vectors of D.
//
//   match_similarities   reads the metric: B N D elements, and writes 2 B S numbers; 2 B S T D flops
//   match_maps           reads and writes some 50 B N bytes; O(B N) comparisons
//
// The first is bound by arithmetic from D ~ 50 on. A task is a group of sources of one sample. The products of a few
// sources and targets are summed side by side, with channels in the lanes, so that the metric is read where it lies;
// the similarities of these sources stay in L1. Only vectors whose squares leave the range of float32, and all of
// float64, are copied first, divided by their lengths.
//
// A cosine is defined as summed in float64 and rounded to float32; ties go to the lowest target, then to the lowest
// source. The products are summed in float32 (float64 for float64), with a bound on the error, and what is defined is
// computed only where this error could change a decision: for all targets that may be the best of a source, if there is
// more than one, and for the sources that may or may not be among the r best.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace mlip::cpu {

// The best target of a source.
struct Proposal {
  float similarity;  // cosine to it, -inf where there is none
  float error;       // how far that may lie from the cosine as it is defined; 0 if this is it
  int64_t target;    // its number
};

// Tensors are contiguous, except that the metric may have any strides over batch and tokens.
struct Matching {
  int64_t batch, tokens;
  int64_t prefix;  // leading tokens that take no part
  int64_t r;       // 1 <= r <= min(S, T)

  // Read:
  const double* guide;  // [B, N], or null
  double guide_weight;
  const Flag* mask;  // [B, N] true for real tokens, or null

  // Written by match_similarities:
  Proposal* proposals;  // [B, S]

  // Written by match_maps:
  int64_t* assignment;  // [B, N]
  int64_t* kept;        // [B, N - r]
  int64_t* removed;     // [B, r]
  bool* merged_mask;    // [B, N - r], only with a mask
  bool* dropped;        // [B, N], only with a mask

  int64_t first_source() const { return prefix + prefix % 2; }
  int64_t first_target() const { return prefix + 1 - prefix % 2; }
  int64_t sources() const { return count_from(first_source()); }
  int64_t targets() const { return count_from(first_target()); }
  bool real(int64_t b, int64_t n) const { return mask == nullptr || mask[b * tokens + n]; }

 private:
  int64_t count_from(int64_t first) const { return first < tokens ? (tokens - first + 1) / 2 : 0; }
};

template <typename T>
struct Similarities : Matching {
  static constexpr int64_t PANEL = 448 << 10;  // bytes; the vectors of each side stay in L2

  const T* metric;                     // [B, N, D]
  int64_t stride_batch, stride_token;  // in elements
  int64_t width;                       // D

  int64_t row_bytes() const { return width * int64_t(sizeof(Accumulate<T>)); }

  // Sources per task. How they are grouped changes no result.
  int64_t group() const {
    const bool whole = batch >= 8 && sources() * row_bytes() <= PANEL;
    return whole || sources() < 64 ? sources() : 64;
  }
  int64_t groups() const { return (sources() + group() - 1) / group(); }
  int64_t tasks() const { return batch * groups(); }

  // Whether tasks are samples in one piece, and the second-level cache has room for the next one too.
  bool read_ahead() const {
    return groups() == 1 && stride_token == width && tokens * width * int64_t(sizeof(T)) <= 2 * PANEL;
  }
};

// Over tasks: fills the proposals.
template <typename T>
void match_similarities(const Similarities<T>& problem, int64_t begin, int64_t end);

// The cosine of two tokens of sample b, as it is defined.
template <typename T>
float match_exactly(const Similarities<T>& problem, int64_t b, int64_t source, int64_t target);

// Over samples: fills the maps, from what match_similarities left.
template <typename T>
void match_maps(const Similarities<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
