// The best target of every source, by cosine, for a block's tiles of sources and targets. Device code only.
//
// Tokens lie in shared memory in pieces of 128 bytes, as rows of PITCH words. Of the SIDE x 64 sources and targets of a
// tile, warp (i, j) of 4 x 4 multiplies SIDE x 16 sources and targets. While a piece is there, all threads add up the
// squares of its rows in float64. Half precision is multiplied as it is; of float32 the tensor cores take the upper and
// the lower part, in three products.
//
// These products only tell which targets may be the best, by `tolerance`, a bound on their error. Those few are
// compared by what the definition says: a cosine summed in float64 and rounded to float32, by a warp for each source.
// Ties go to the lowest target, so none is compared behind one with a cosine of 1: equal tokens cost little. Rows so
// short or so long that the squares of float32 could leave its range have no approximate cosine, and are always
// compared.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "cuda/merging/merging.h"

namespace mlip::cuda::merging {

constexpr int WARPS = 16;
constexpr int THREADS = WARP * WARPS;
constexpr int WARP_ROWS = 4, WARP_COLUMNS = 4;           // of warps, in a tile
constexpr int PIECE = 32;                                // words of a token that are multiplied at a time
constexpr int PITCH = PIECE + 4;                         // words from row to row, so that fragments meet no bank twice
constexpr int STEP = 8;                                  // words that one product takes
constexpr float SHORTEST = 0x1p-40f, LONGEST = 0x1p60f;  // rows that are multiplied in float32
constexpr float ABSENT = -1.0f;                          // scale of a row that is masked or out of bounds

template <int SIDE>
constexpr int TILE = 64 * SIDE;  // sources, and targets

// What a block keeps of a tile, besides its operands. Rows 0 to TILE - 1 are sources, those behind them targets.
template <int SIDE>
struct alignas(16) TileState {
  double norm[2 * TILE<SIDE>];                    // 0 where a row has no direction: it is zero, or not finite
  float scale[2 * TILE<SIDE>];                    // 1 / norm; 0 for norm 0, NaN outside of the range, or ABSENT
  float maxima[WARP_COLUMNS][TILE<SIDE>];         // of the approximate cosines of a source, by warp
  unsigned candidates[WARP_COLUMNS][TILE<SIDE>];  // one bit for each of a warp's targets
  float highest[TILE<SIDE>];                      // approximate cosine of a source, over all tiles so far
  float similarity[TILE<SIDE>];                   // highest cosine, -inf where there is no target
  int target[TILE<SIDE>];                         // whose
};

template <int SIDE>
constexpr int OPERANDS = 2 * TILE<SIDE> * PITCH;  // words of one piece of both sides

// By how much two approximate cosines may differ although the cosines tie or stand the other way round. The tensor
// cores align what they add to the largest term and cut it off: each of at most 24 terms of an instruction, and its
// result, loses less than 2^-23 of the sum of all |products| of a piece, and these add up to 1 over the pieces. Beside
// that, the parts of float32 that are not multiplied, sums over pieces, scales, and the rounding of cosines to float32.
template <typename T>
__device__ inline float tolerance(int64_t width) {
  constexpr float products = sizeof(T) == 4 ? 12 * 16 * 0x1p-23f + 0x1p-18f : 4 * 25 * 0x1p-23f;
  const float pieces = float(width * int64_t(sizeof(T)) / (PIECE * 4) + 8);
  return 2 * (products + pieces * 0x1p-24f) + 0x1p-23f;
}

// The upper 11 bits of a float, and those of what remains.
template <int N>
struct Parts {
  float high[N], low[N];

  __device__ explicit Parts(const uint32_t (&bits)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#if __CUDA_ARCH__ >= 800
      high[i] = __uint_as_float(bits[i] & 0xffffe000u);
      low[i] = __uint_as_float(__float_as_uint(__uint_as_float(bits[i]) - high[i]) & 0xffffe000u);
#else
      high[i] = __uint_as_float(bits[i]);
      low[i] = 0.0f;
#endif
    }
  }
};

__device__ inline void multiply_add_parts(float (&d)[4], const Parts<4>& a, const Parts<2>& b) {
#if __CUDA_ARCH__ >= 800
  multiply_add_tf32(d, a.low, b.high);
  multiply_add_tf32(d, a.high, b.low);
  multiply_add_tf32(d, a.high, b.high);
#else
  multiply_add_float32(d, a.high, b.high);
#endif
}

// A piece of tokens n = first + 2 i, i < count, and zeros up to `padded` rows and behind the last channel.
template <typename T>
__device__ inline void copy_piece(const Match& p, const T* sample, int first, int count, int padded, int64_t channel,
                                  uint32_t* to) {
  const T* from = sample + channel;
  const int64_t left = p.width - channel;
  if (p.vector) {
    constexpr int VECTOR = 16 / sizeof(T), VECTORS = PIECE / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < padded * VECTORS; i += THREADS) {
      const int row = i / VECTORS, vector = i % VECTORS;
      const bool in_bounds = row < count && vector * VECTOR < left;
      const int64_t offset = in_bounds ? (first + 2 * int64_t(row)) * p.stride_token + vector * VECTOR : 0;
      copy_vector(to + row * PITCH + vector * 4, from + offset, in_bounds);
    }
  } else {
    constexpr int ELEMENTS = PIECE * 4 / sizeof(T);
#pragma unroll 1
    for (int i = threadIdx.x; i < padded * ELEMENTS; i += THREADS) {
      const int row = i / ELEMENTS, element = i % ELEMENTS;
      const bool in_bounds = row < count && element < left;
      reinterpret_cast<T*>(to + row * PITCH)[element] =
          in_bounds ? from[(first + 2 * int64_t(row)) * p.stride_token + element] : narrow<T>(0.0f);
    }
  }
}

// sums += products of a piece, for a warp's sources and targets.
template <typename T, int SIDE>
__device__ inline void multiply_piece(const uint32_t* rows, const uint32_t* columns, int words,
                                      float (&sums)[SIDE][2 * SIDE][4]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  float run[SIDE][2 * SIDE][4] = {};
#pragma unroll 1
  for (int step = 0; step < words; step += STEP) {
    uint32_t a[SIDE][4];
#pragma unroll
    for (int m = 0; m < SIDE; ++m) {
      const uint32_t* from = rows + (16 * m + g) * PITCH + step + t;
      a[m][0] = from[0];
      a[m][1] = from[8 * PITCH];
      a[m][2] = from[4];
      a[m][3] = from[8 * PITCH + 4];
    }
#pragma unroll
    for (int n = 0; n < 2 * SIDE; ++n) {
      const uint32_t* from = columns + (8 * n + g) * PITCH + step + t;
      const uint32_t b[2] = {from[0], from[4]};
      if constexpr (sizeof(T) == 4) {
        const Parts<2> right(b);
#pragma unroll
        for (int m = 0; m < SIDE; ++m) multiply_add_parts(run[m][n], Parts<4>(a[m]), right);
      } else {
#pragma unroll
        for (int m = 0; m < SIDE; ++m) multiply_add(run[m][n], a[m], b, T{});
      }
    }
  }
#pragma unroll
  for (int m = 0; m < SIDE; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * SIDE; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += run[m][n][i];
    }
  }
}

template <typename T>
__device__ inline double add_square(double sum, T value) {
  const double wide = widen(value);
  return fma(wide, wide, sum);
}

// Sum of squares of a thread's part of a row's piece.
template <typename T, int WORDS>
__device__ inline double add_squares(double sum, const uint32_t* from) {
  constexpr int ELEMENTS = 4 / sizeof(T);
#pragma unroll
  for (int w = 0; w < WORDS; w += 4) {
    const auto words = *reinterpret_cast<const Pack<T, 4 * ELEMENTS>*>(from + w);
#pragma unroll
    for (int e = 0; e < 4 * ELEMENTS; ++e) sum = add_square(sum, words.element[e]);
  }
  return sum;
}

// <a, b> in float64, by the lanes of a warp; all of them know it. Equal rows have equal products.
template <typename T>
__device__ inline double exact_product(const Match& p, const T* a, const T* b) {
  const int lane = threadIdx.x % WARP;
  double sum = 0;
  if (p.vector) {
    constexpr int VECTOR = 16 / sizeof(T);
#pragma unroll 1
    for (int64_t d = lane * VECTOR; d < p.width; d += WARP * VECTOR) {
      float left[VECTOR], right[VECTOR];
      load<VECTOR>(a + d, left);
      load<VECTOR>(b + d, right);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum = fma(double(left[v]), double(right[v]), sum);
    }
  } else {
#pragma unroll 1
    for (int64_t d = lane; d < p.width; d += WARP) sum = fma(double(widen(a[d])), double(widen(b[d])), sum);
  }
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

// An approximate cosine, from a product and the scales of its two rows.
__device__ inline float approximate(float product, float source_scale, float target_scale) {
  return source_scale == 0.0f || target_scale == 0.0f ? 0.0f : product * source_scale * target_scale;
}

// The best target of sources first to first + count of sample b, count <= TILE: state.similarity and state.target.
template <typename T, int SIDE>
__device__ inline void find_best(const Match& p, int64_t b, int first, int count, TileState<SIDE>& state,
                                 uint32_t* operands) {
  constexpr int ROWS = 16 * SIDE, HALF = TILE<SIDE>;   // of a warp, of a tile
  constexpr int PARTS = THREADS / (2 * HALF);          // threads that add up the squares of a row
  constexpr int64_t CHANNELS = PIECE * 4 / sizeof(T);  // in a piece
  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
  const int warp_row = warp / WARP_COLUMNS, warp_column = warp % WARP_COLUMNS;
  const T* sample = static_cast<const T*>(p.metric) + b * p.stride_batch;
  const int pieces = int(ceil_div(p.width, CHANNELS)), targets = p.targets();
  const int first_row = p.first_source() + 2 * first;
  const float margin = tolerance<T>(p.width);
  const auto whole = [](int rows) { return (rows + ROWS - 1) / ROWS * ROWS; };
  for (int i = thread; i < HALF; i += THREADS) {
    state.highest[i] = -INFINITY;
    state.similarity[i] = -INFINITY;
    state.target[i] = 0;
  }

  for (int start = 0; start < targets; start += HALF) {
    const int width = targets - start < HALF ? targets - start : HALF;
    const int first_column = p.first_target() + 2 * start;
    const auto copy = [&](int piece) {
      uint32_t* to = operands + piece % p.stages * OPERANDS<SIDE>;
      copy_piece(p, sample, first_row, count, whole(count), piece * CHANNELS, to);
      copy_piece(p, sample, first_column, width, whole(width), piece * CHANNELS, to + HALF * PITCH);
      __pipeline_commit();
    };
    const int row = thread / PARTS;  // whose squares this thread adds up
    const bool squares = row < HALF ? row < count : row - HALF < width;
    const bool multiplies = warp_row * ROWS < count && warp_column * ROWS < width;
    double square = 0;
    float sums[SIDE][2 * SIDE][4] = {};
    copy(0);
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      if (p.stages > 1 && piece + 1 < pieces) {
        copy(piece + 1);
        __pipeline_wait_prior(1);
      } else {
        __pipeline_wait_prior(0);
      }
      __syncthreads();  // the piece is there
      const uint32_t* rows = operands + piece % p.stages * OPERANDS<SIDE>;
      if (squares) {
        square = add_squares<T, PIECE / PARTS>(square, rows + row * PITCH + thread % PARTS * (PIECE / PARTS));
      }
      const int64_t words = ceil_div((p.width - piece * CHANNELS) * int64_t(sizeof(T)), 4);
      if (multiplies) {
        multiply_piece<T, SIDE>(rows + warp_row * ROWS * PITCH, rows + (HALF + warp_column * ROWS) * PITCH,
                                words < PIECE ? int(words) : PIECE, sums);
      }
      if (piece + 1 == pieces) break;
      __syncthreads();  // the piece has been read
      if (p.stages == 1) copy(piece + 1);
    }

#pragma unroll
    for (int distance = 1; distance < PARTS; distance *= 2) square += __shfl_xor_sync(~0u, square, distance);
    if (thread % PARTS == 0) {
      const int n = row < HALF ? first_row + 2 * row : first_column + 2 * (row - HALF);
      const double root = sqrt(square), norm = root > 0 && root < INFINITY ? root : 0;
      const float scale = norm == 0                           ? 0.0f
                          : norm < SHORTEST || norm > LONGEST ? __int_as_float(0x7fffffff)
                                                              : float(1 / norm);
      state.norm[row] = norm;
      state.scale[row] = squares && p.real(b, n) ? scale : ABSENT;
    }
    __syncthreads();  // norms and scales are there

    float target_scale[2 * SIDE][2];
#pragma unroll
    for (int n = 0; n < 2 * SIDE; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) target_scale[n][e] = state.scale[HALF + warp_column * ROWS + 8 * n + 2 * t + e];
    }
#pragma unroll
    for (int m = 0; m < 2 * SIDE; ++m) {
      const int source = warp_row * ROWS + 8 * m + g;
      const float source_scale = state.scale[source];
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4 * SIDE; ++i) {
        float& sum = sums[m / 2][i / 2][m % 2 * 2 + i % 2];
        const float scale = target_scale[i / 2][i % 2];
        sum = approximate(sum, source_scale, scale);
        if (scale != ABSENT) maximum = fmaxf(maximum, sum);  // which leaves out NaN
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      if (t == 0) state.maxima[warp_column][source] = maximum;
    }
    __syncthreads();  // maxima are there

#pragma unroll
    for (int m = 0; m < 2 * SIDE; ++m) {
      const int source = warp_row * ROWS + 8 * m + g;
      float least = state.highest[source];
#pragma unroll
      for (int w = 0; w < WARP_COLUMNS; ++w) least = fmaxf(least, state.maxima[w][source]);
      least -= margin;
      unsigned candidates = 0;
#pragma unroll
      for (int i = 0; i < 4 * SIDE; ++i) {
        const bool may = target_scale[i / 2][i % 2] != ABSENT && !(sums[m / 2][i / 2][m % 2 * 2 + i % 2] < least);
        if (may) candidates |= 1u << (i / 2 * 8 + 2 * t + i % 2);
      }
      candidates |= __shfl_xor_sync(~0u, candidates, 1);
      candidates |= __shfl_xor_sync(~0u, candidates, 2);
      if (t == 0) state.candidates[warp_column][source] = candidates;
    }
    __syncthreads();  // candidates are there

    for (int source = warp; source < count; source += WARPS) {
      if (state.scale[source] == ABSENT) continue;
      const T* left = sample + (first_row + 2 * int64_t(source)) * p.stride_token;
      const double norm = state.norm[source];
      float highest = state.highest[source], similarity = state.similarity[source];
      int target = state.target[source];
      for (int w = 0; w < WARP_COLUMNS; ++w) {
        highest = fmaxf(highest, state.maxima[w][source]);
        for (unsigned rest = state.candidates[w][source]; rest && similarity < 1.0f; rest &= rest - 1) {
          const int column = w * ROWS + __ffs(rest) - 1;
          const double norms = norm * state.norm[HALF + column];
          float cosine = 0.0f;
          if (norms > 0) {
            const T* right = sample + (first_column + 2 * int64_t(column)) * p.stride_token;
            cosine = float(exact_product(p, left, right) / norms);
          }
          if (cosine > similarity) {
            similarity = cosine;
            target = start + column;
          }
        }
      }
      __syncwarp();  // all lanes have read
      if (lane == 0) {
        state.highest[source] = highest;
        state.similarity[source] = similarity;
        state.target[source] = target;
      }
    }
    __syncthreads();  // the tile may be replaced
  }
}

}  // namespace mlip::cuda::merging
