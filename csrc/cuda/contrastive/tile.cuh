// Tiles of 64 x 64 similarities: the valid tokens, their copies in shared memory, their products, and the largest in
// every column. Device code only, for blocks of `THREADS`.
//
// Tokens lie in shared memory in pieces of 128 bytes, 64 of them to an operand: a step of the tensor cores takes 32
// bytes of each, 8 channels of float32 or 16 in half precision. Warp w has columns 16 w to 16 w + 15 of all rows, in
// groups of 16 rows and eighths of a tile, that is 8 columns; a lane has those that elements.h names.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "cuda/contrastive/contrastive.h"

namespace mlip::cuda::contrastive {

constexpr int WARPS = 4;
constexpr int THREADS = WARP * WARPS;
constexpr int TILE = 64;  // rows and columns
constexpr int GROUPS = TILE / 16;
constexpr int PIECE = 32;         // words of a token that are multiplied at a time
constexpr int PITCH = PIECE + 4;  // words from token to token in shared memory, so that fragments meet no bank twice
constexpr int STEP = 8;           // words that one product takes
constexpr int OPERAND = TILE * PITCH;
constexpr int NOTHING = 0x7fffffff;

// Writes to `valid` the 0 <= i < count with mask[first + i], ascending (all, without a mask), and returns how many
// they are. By all threads of a block; each warp looks at one part, twice: to count, and to write. `counts` has WARPS
// members. All threads see the result; between two calls with the same `counts` there is a barrier.
__device__ inline int find_valid_indices(const Flag* mask, int64_t first, int count, uint16_t* valid, int* counts) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int part = (count + THREADS - 1) / THREADS * WARP;
  const int begin = warp * part, end = begin + part < count ? begin + part : count;
  const auto real = [&](int i) { return i < end && (mask == nullptr || mask[first + i]); };

  int found = 0;
  for (int i = begin; i < end; i += WARP) found += __popc(__ballot_sync(~0u, real(i + lane)));
  if (lane == 0) counts[warp] = found;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += counts[w];
    total += counts[w];
  }
  for (int i = begin; i < end; i += WARP) {
    const bool is_valid = real(i + lane);
    const unsigned all = __ballot_sync(~0u, is_valid);
    if (is_valid) valid[before + __popc(all & ((1u << lane) - 1))] = uint16_t(i + lane);
    before += __popc(all);
  }
  __syncthreads();
  return total;
}

// A piece of `rows` tokens, and zeros up to `padded` of them and behind the last channel.
template <typename T, typename Offset>
__device__ inline void copy_piece(uint32_t* to, const TokenSide& side, Offset offset, int rows, int padded,
                                  int64_t first, int64_t channels) {
  const T* from = static_cast<const T*>(side.values) + first;
  const int64_t left = channels - first;
  if (side.vector) {
    constexpr int VECTOR = 16 / sizeof(T), VECTORS = PIECE / 4;
#pragma unroll 2
    for (int i = threadIdx.x; i < padded * VECTORS; i += THREADS) {
      const int row = i / VECTORS, vector = i % VECTORS;
      const T* source = from + offset(row < rows ? row : 0) + (vector * VECTOR < left ? vector * VECTOR : 0);
      copy_vector(to + row * PITCH + vector * 4, source, row < rows && vector * VECTOR < left);
    }
  } else {
    constexpr int ELEMENTS = PIECE * 4 / sizeof(T);
    for (int i = threadIdx.x; i < padded * ELEMENTS; i += THREADS) {
      const int row = i / ELEMENTS, element = i % ELEMENTS;
      const bool in_bounds = row < rows && element < left;
      reinterpret_cast<T*>(to + row * PITCH)[element] = in_bounds ? from[offset(row) + element] : narrow<T>(0.0f);
    }
  }
}

// The products of a piece: fragments of the rows times those of a warp's 16 columns.
template <typename T>
__device__ inline void multiply_piece(float (&sums)[GROUPS][2][4], const uint32_t* rows, const uint32_t* columns,
                                      int groups, int eighths, int words) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  float run[GROUPS][2][4] = {};
#pragma unroll 1
  for (int step = 0; step < words; step += STEP) {
    uint32_t b[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t* from = columns + (8 * n + g) * PITCH + step + t;
      b[n][0] = n < eighths ? from[0] : 0;
      b[n][1] = n < eighths ? from[4] : 0;
    }
    [[maybe_unused]] Split<2> parts[2];
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int n = 0; n < 2; ++n) parts[n] = split<2>({__uint_as_float(b[n][0]), __uint_as_float(b[n][1])});
    }
#pragma unroll
    for (int m = 0; m < GROUPS; ++m) {
      if (m >= groups) break;
      const uint32_t* from = rows + (16 * m + g) * PITCH + step + t;
      const uint32_t a[4] = {from[0], from[8 * PITCH], from[4], from[8 * PITCH + 4]};
      if constexpr (sizeof(T) == 4) {
        const Split<4> left =
            split<4>({__uint_as_float(a[0]), __uint_as_float(a[1]), __uint_as_float(a[2]), __uint_as_float(a[3])});
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n < eighths) multiply_add(run[m][n], left, parts[n], true);
        }
      } else {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n < eighths) multiply_add(run[m][n], a, b[n], T{});
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < GROUPS; ++m) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += run[m][n][i];
    }
  }
}

// As in PyTorch: NaN is larger than everything.
__device__ inline bool beats(float value, float champion) { return !(value <= champion) && champion == champion; }

// The largest of the `rows` similarities of each of a lane's columns, and its row; all lanes of a column know it.
__device__ inline void reduce_columns(const float (&sums)[GROUPS][2][4], int rows, float (&maxima)[4],
                                      int (&argmax)[4]) {
  const int g = threadIdx.x % WARP / 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float value = g < rows ? sums[0][c / 2][c % 2] : -INFINITY;
    int row = g < rows ? g : NOTHING;
#pragma unroll
    for (int i = 1; i < 2 * GROUPS; ++i) {
      const float other = sums[i / 2][c / 2][i % 2 * 2 + c % 2];
      if (8 * i + g < rows && beats(other, value)) {
        value = other;
        row = 8 * i + g;
      }
    }
#pragma unroll
    for (int distance = 4; distance < WARP; distance *= 2) {
      const float other = __shfl_xor_sync(~0u, value, distance);
      const int other_row = __shfl_xor_sync(~0u, row, distance);
      if (beats(other, value) || (!beats(value, other) && other_row < row)) {
        value = other;
        row = other_row;
      }
    }
    maxima[c] = value;
    argmax[c] = row;
  }
}

}  // namespace mlip::cuda::contrastive
