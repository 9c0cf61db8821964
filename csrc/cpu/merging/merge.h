// Merging tokens, [B, N, C] to [B, N', C] with N' = N - r: which of them merge (matching), and moving their rows.
//
// Matching is bipartite: every token at an even position proposes to merge into the token at an odd position with the
// highest cosine, and the r best proposals are carried out. S sources, T targets, S, T ~ N / 2, vectors of D.
//
//   match_similarities   reads the metric: B N D elements, and writes 2 B S numbers; 2 B S T D flops
//   match_indices        reads and writes some 50 B N bytes; O(B N) comparisons
//
// The first is bound by arithmetic from D ~ 50 on. A task is a group of sources of one sample. The products of a few
// sources and targets are summed side by side, with channels in the lanes, so that the metric is read where it lies;
// the similarities of these sources stay in L1. Only vectors whose squares leave the range of float32, and all of
// float64, are copied first, divided by their lengths.
//
// A cosine is defined as summed in float64 and rounded to float32; ties go to the lowest target, then to the lowest
// source. The products are summed in float32 (float64 for float64), with a bound on the error, and the defined cosine
// is computed only where this error could change a decision: for all targets that may be the best of a source, if there
// is more than one, and for the sources that may or may not be among the r best.
//
// Moving rows:
//
//   combine   y_o = sum_n w_n x_n over the rows n of output row o; to merge, w_n = size_n / size_o
//   unmerge   x_n = w_n y_a(n), with a(n) the output row of input row n; the transposed copy back
//
// Each reads its input once and writes its output once: B (N + N') C elements, bound by memory; indices and weights are
// some 30 B N bytes. Input rows are cut into tasks of BLOCK rows of one sample. A row that nothing is merged into is a
// copy of bits. The terms of a sum are added in ascending order behind the row that it starts from, product and
// addition rounded separately as in plain PyTorch, so nothing depends on the number of threads.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace mlip::cpu {

// The best target of a source.
struct Proposal {
  float similarity;  // cosine to it, -inf where there is none
  float error;       // largest distance from the defined cosine; 0 if this is it
  int64_t target;    // counted among the targets
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

  // Written by match_indices:
  int64_t* assignment;  // [B, N] output row of each input row
  int64_t* kept;        // [B, N - r] input row that each output row starts from
  int64_t* removed;     // [B, r] the other input rows
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

// Over samples: fills the indices, from what match_similarities left.
template <typename T>
void match_indices(const Similarities<T>& problem, int64_t begin, int64_t end);

// Where rows go. Tensors are contiguous.
struct RowIndices {
  static constexpr int64_t BLOCK = 64;

  int64_t batch, tokens, outputs;  // B, N, N'
  const int64_t* assignment;       // [B, N]
  const int64_t* kept;             // [B, N']
  const int64_t* removed;          // [B, N - N']
  const Flag* mask;                // [B, N'], or null: every output row is real
  const Flag* dropped;             // [B, N], or null: every input row has an output row

  // Input rows per task. How they are cut changes no result.
  int64_t block() const { return batch >= 16 || tokens < BLOCK ? tokens : BLOCK; }
  int64_t blocks() const { return tokens > 0 ? (tokens + block() - 1) / block() : 0; }
  int64_t tasks() const { return batch * blocks(); }
  bool lost(int64_t b, int64_t n) const { return dropped != nullptr && dropped[b * tokens + n]; }
};

template <typename T>
struct MergeRows : RowIndices {
  static constexpr int64_t STREAMED = 4 << 20;  // bytes: larger outputs go past the caches

  int64_t channels;  // C

  // Read:
  const T* from;                       // [B, N, C], to unmerge [B, N', C]
  int64_t stride_batch, stride_token;  // in elements
  const Accumulate<T>* weight;         // [B, N], or null: every weight is 1

  // Written:
  T* to;  // [B, N', C], to unmerge [B, N, C]

  // Whether rows can be stored past the caches, and should be: they are whole vectors, and there are many.
  bool streamed(int64_t rows) const {
    const int64_t bytes = channels * int64_t(sizeof(T));
    return bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0 && batch * rows * bytes >= STREAMED;
  }
};

// Over samples: what is wrong with their indices, or null. They are addresses: kept and removed have to name every
// input row once, assignment the output row of each, and that of a kept row is the one that it starts.
const char* merge_fault(const RowIndices& indices, int64_t begin, int64_t end);

// Over tasks: the same for unmerge_rows, which reads only assignment.
const char* unmerge_fault(const RowIndices& indices, int64_t begin, int64_t end);

// Over samples: fills merged_size [B, N'] and weight [B, N], from size [B, N], or null where every size is 1.
template <typename A>
void merge_weights(const RowIndices& indices, const float* size, float* merged_size, A* weight, int64_t begin,
                   int64_t end);

// Over tasks: fills `to` with weighted sums.
template <typename T>
void combine_rows(const MergeRows<T>& problem, int64_t begin, int64_t end);

// Over tasks: fills `to` with weighted copies.
template <typename T>
void unmerge_rows(const MergeRows<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
