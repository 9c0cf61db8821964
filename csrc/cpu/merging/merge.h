// Merging rows of tokens, x [B, N, C] to [B, N', C] with N' = N - r, and the transposed copy back.
//
//   merge     y_o = sum_n w_n x_n over the rows n of output row o, where w_n = size_n / size_o
//   combine   the same with given weights, or with none
//   spread    x_n = w_n y_a(n), with a(n) the output row of input row n, or with no weights y_a(n)
//
// Each reads its input once and writes its output once: B (N + N') C elements, bound by memory; the maps and weights
// are some 30 B N bytes. Output rows are cut into tasks of BLOCK rows of one sample. A row that nothing is merged into
// is a copy of bits. The terms of a sum are added in ascending order behind the row that it starts from, product and
// addition rounded separately as in plain PyTorch, so nothing depends on the number of threads.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace mlip::cpu {

// Tensors are contiguous, except that the rows that are read may have any strides over batch and tokens.
template <typename T>
struct MergeRows {
  static constexpr int64_t BLOCK = 64;
  static constexpr int64_t STREAMED = 4 << 20;  // bytes: larger outputs go past the caches

  int64_t batch, tokens, outputs, channels;  // B, N, N', C

  // Read:
  const T* from;                       // [B, N, C], for spread [B, N', C]
  int64_t stride_batch, stride_token;  // in elements
  const int64_t* assignment;           // [B, N]
  const int64_t* kept;                 // [B, N']
  const int64_t* removed;              // [B, N - N']
  const Flag* mask;                    // [B, N'], or null: every output row is real
  const Flag* dropped;                 // [B, N], or null: every input row has an output row
  const float* size;                   // [B, N], or null: every size is 1; merge only
  const Accumulate<T>* known_weight;   // [B, N], or null: every weight is 1; combine and spread only

  // Written:
  T* to;                  // [B, N', C], for spread [B, N, C]
  float* merged_size;     // [B, N'], merge only
  Accumulate<T>* weight;  // [B, N], merge only

  // Input rows per task. How they are cut changes no result.
  int64_t block() const { return batch >= 16 || tokens < BLOCK ? tokens : BLOCK; }
  int64_t blocks() const { return tokens > 0 ? (tokens + block() - 1) / block() : 0; }
  int64_t tasks() const { return batch * blocks(); }
  bool lost(int64_t b, int64_t n) const { return dropped != nullptr && dropped[b * tokens + n]; }

  // Whether rows can be stored past the caches, and should be: they are whole vectors, and there are many.
  bool streamed(int64_t rows) const {
    const int64_t bytes = channels * int64_t(sizeof(T));
    return bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0 && batch * rows * bytes >= STREAMED;
  }
};

// Over samples: what is wrong with their maps, or null. They are addresses: kept and removed have to name every input
// row once, assignment the output row of each, and that of a kept row is the one that it starts.
template <typename T>
const char* merge_fault(const MergeRows<T>& problem, int64_t begin, int64_t end);

// Over tasks: the same for spread, which reads of the maps only assignment.
template <typename T>
const char* spread_fault(const MergeRows<T>& problem, int64_t begin, int64_t end);

// Over samples: fills merged_size and weight.
template <typename T>
void merge_weights(const MergeRows<T>& problem, int64_t begin, int64_t end);

// Over tasks: fills `to` with sums, weighted by known_weight.
template <typename T>
void combine_rows(const MergeRows<T>& problem, int64_t begin, int64_t end);

// Over tasks: fills `to` with copies.
template <typename T>
void spread_rows(const MergeRows<T>& problem, int64_t begin, int64_t end);

}  // namespace mlip::cpu
