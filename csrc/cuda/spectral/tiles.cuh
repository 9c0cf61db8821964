// Tiles of tokens in the memory of a block, and matrices as the fragments that mma.cuh multiplies (device code only).
// The story is told in stages.cuh.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/elements.cuh"
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

constexpr int VALUES = 8;    // channels of a lane in a product
constexpr int PRODUCTS = 4;  // products with 8 channels each
constexpr int LOADS = 4;     // in flight

__device__ inline int at(int point, int channel) {
  return point * CHANNELS + (((channel / 8 ^ point) & 3) * 8) + channel % 8;
}

struct Block {
  const float4* fragments;
  const void* table;  // factors or bands of the coefficients
  float* tiles;
  int tile_floats;
  int64_t first_channel;
  int lane, warp;

  __device__ float* tile(int number) const { return tiles + int64_t(number) * tile_floats; }
};

// --- elements of the tokens ------------------------------------------------------------------------------------------

__device__ inline float element(const void* data, Type type, int64_t index) {
  if (type == Type::float32) return static_cast<const float*>(data)[index];
  if (type == Type::float16) return widen(static_cast<const __half*>(data)[index]);
  return widen(static_cast<const __nv_bfloat16*>(data)[index]);
}

__device__ inline void put(void* data, Type type, int64_t index, float value) {
  if (type == Type::float32) {
    static_cast<float*>(data)[index] = value;
  } else if (type == Type::float16) {
    static_cast<__half*>(data)[index] = narrow<__half>(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[index] = narrow<__nv_bfloat16>(value);
  }
}

__device__ inline uint32_t pack(__half low, __half high) {
  return uint32_t(__half_as_ushort(high)) << 16 | __half_as_ushort(low);
}
__device__ inline uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return uint32_t(__bfloat16_as_ushort(high)) << 16 | __bfloat16_as_ushort(low);
}

template <typename T>
__device__ inline uint4 packed(const float (&v)[VALUES]) {
  return make_uint4(pack(narrow<T>(v[0]), narrow<T>(v[1])), pack(narrow<T>(v[2]), narrow<T>(v[3])),
                    pack(narrow<T>(v[4]), narrow<T>(v[5])), pack(narrow<T>(v[6]), narrow<T>(v[7])));
}

// Lanes next to each other have 8 channels of a row each. They exchange 4, so that what both store in one access lies
// together: float32 values of channels 0 to 3 and 8 to 11 of the two lanes', or of the others. By all lanes of a warp.
__device__ inline void exchange(float (&values)[VALUES], bool odd) {
#pragma unroll
  for (int v = 0; v < VALUES / 2; ++v) {
    const float received = __shfl_xor_sync(~0u, odd ? values[v] : values[v + 4], 1);
    (odd ? values[v] : values[v + 4]) = received;
  }
}

// Values of 8 channels from `channel` on, of which those below `channels` exist. float32 vectors are `exchange`d.
__device__ inline void put_row(void* data, Type type, bool vector, int64_t row, int64_t channel, int64_t channels,
                               const float (&values)[VALUES]) {
  if (!vector) {
    for (int v = 0; v < VALUES; ++v) {
      if (channel + v < channels) put(data, type, row + channel + v, values[v]);
    }
  } else if (type == Type::float32) {
    const int64_t first = channel / VALUES % 2 ? channel - 4 : channel;
    float* to = static_cast<float*>(data) + row + first;
    if (first < channels) *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    if (first + 8 < channels) {
      *reinterpret_cast<float4*>(to + 8) = make_float4(values[4], values[5], values[6], values[7]);
    }
  } else if (channel < channels) {
    uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(data) + (row + channel) * 2);
    *to = type == Type::float16 ? packed<__half>(values) : packed<__nv_bfloat16>(values);
  }
}

// --- tiles -----------------------------------------------------------------------------------------------------------

// Lanes next to each other write the halves of 8 channels in different order: no bank conflicts.
__device__ inline void put_point(float* tile, int point, int channel, bool odd, const float (&values)[VALUES]) {
  float first[4], second[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    first[v] = odd ? values[v + 4] : values[v];
    second[v] = odd ? values[v] : values[v + 4];
  }
  float* to = tile + at(point, channel);
  *reinterpret_cast<float4*>(to + (odd ? 4 : 0)) = make_float4(first[0], first[1], first[2], first[3]);
  *reinterpret_cast<float4*>(to + (odd ? 0 : 4)) = make_float4(second[0], second[1], second[2], second[3]);
}

__device__ inline void get_point(const float* tile, int point, int channel, bool odd, float (&values)[VALUES]) {
  const float* from = tile + at(point, channel);
  const float4 one = *reinterpret_cast<const float4*>(from + (odd ? 4 : 0));
  const float4 other = *reinterpret_cast<const float4*>(from + (odd ? 0 : 4));
  const float4 low = odd ? other : one, high = odd ? one : other;
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ inline void unpack(const uint4& raw, Type type, float (&values)[VALUES]) {
  if (type == Type::float16) {
    load<VALUES>(reinterpret_cast<const __half*>(&raw), values);
  } else {
    load<VALUES>(reinterpret_cast<const __nv_bfloat16*>(&raw), values);
  }
}

// Rows of tokens become points of a tile, from point `first` of each row of the tile on.
__device__ inline void read(const Map& map, const Block& block, const Tokens& tokens, int64_t b, int skipped, int first,
                            float* tile) {
  const int points = map.height * map.row, thread = block.warp * WARP + block.lane;
  const int64_t start = b * tokens.stride_batch + skipped * tokens.stride_token + block.first_channel;
  const auto point_of = [&](int n) {
    return map.row == 1 ? n * map.pitch + first : n / map.row * map.pitch + n % map.row + first;
  };
  if (!tokens.vector) {
    for (int n = block.warp; n < points; n += WARPS) {
      const bool there = block.first_channel + block.lane < map.channels;
      const int64_t from = start + n * tokens.stride_token + block.lane;
      tile[at(point_of(n), block.lane)] = there ? element(tokens.data, map.type, from) : 0.0f;
    }
    return;
  }
  const bool single = map.type == Type::float32;
  const int shift = single ? 3 : 2, vector = single ? 4 : 8;  // accesses for each row, channels in each
  const int channel = (thread & ((1 << shift) - 1)) * vector, step = THREADS >> shift;
  const bool there = block.first_channel + channel < map.channels;
  for (int n = thread >> shift; n < points; n += LOADS * step) {
    uint4 raw[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      raw[i] = make_uint4(0, 0, 0, 0);
      if (!there || n + i * step >= points) continue;
      const int64_t from = start + (n + i * step) * tokens.stride_token + channel;
      raw[i] = *reinterpret_cast<const uint4*>(static_cast<const char*>(tokens.data) + from * (single ? 4 : 2));
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      if (n + i * step >= points) break;
      const int point = point_of(n + i * step);
      if (single) {
        *reinterpret_cast<uint4*>(tile + at(point, channel)) = raw[i];
      } else {
        float values[VALUES];
        unpack(raw[i], map.type, values);
        put_point(tile, point, channel, thread >> 2 & 1, values);
      }
    }
  }
}

__device__ inline void write_prefix(const Map& map, const Block& block, int64_t b) {
  const int64_t channel = block.first_channel + block.lane;
  if (channel >= map.channels) return;
  for (int n = block.warp; n < map.prefix; n += WARPS) {
    const int64_t from = b * map.x.stride_batch + n * map.x.stride_token + channel;
    const float value = map.copy_prefix ? element(map.x.data, map.type, from) : 0.0f;
    put(map.out, map.type, (b * map.out_tokens + n) * map.channels + channel, value);
  }
}

// --- matrices --------------------------------------------------------------------------------------------------------

__device__ inline float4 fragment_of(const Axis& axis, int m, int k, int lane) {
  const int row = m * axis.row_tile + lane / 4, column = k * axis.column_tile + lane % 4;
  const int other_row = row + axis.row_pair, other_column = column + axis.column_pair;
  const bool r = row < axis.row_limit, c = column < axis.column_limit;
  const Matrix& matrix = axis.matrix;
  const float* from = matrix.data + row * matrix.row + column * matrix.column;
  if (axis.sign != 0.0f) {
    const float real = r && c ? *from : 0.0f, imaginary = r && c ? axis.sign * from[matrix.part] : 0.0f;
    return make_float4(real, imaginary, -imaginary, real);
  }
  const bool rr = r && other_row < axis.rows, cc = c && other_column < axis.columns;
  const int64_t down = axis.row_pair * matrix.row, right = axis.column_pair * matrix.column;
  return make_float4(r && c ? *from : 0.0f, rr && c ? from[down] : 0.0f, r && cc ? from[right] : 0.0f,
                     rr && cc ? from[down + right] : 0.0f);
}

// Puts an element of a matrix where its fragment is.
__device__ inline void put_element(const Axis& axis, int row, int column, float real, float imaginary,
                                   float4* fragments) {
  if (axis.sign != 0.0f) {
    const float part = axis.sign * imaginary;
    fragments[(row / 8 * axis.k_steps + column / 4) * WARP + row % 8 * 4 + column % 4] =
        make_float4(real, part, -part, real);
    return;
  }
  const bool second_row = axis.row_tile == 8 ? row >= axis.row_limit : row % 16 >= 8;
  const bool second_column = axis.column_tile == 4 ? column >= axis.column_limit : column % 8 >= 4;
  if (axis.row_tile == 8 && second_row) row -= axis.row_limit;
  if (axis.column_tile == 4 && second_column) column -= axis.column_limit;
  const int fragment = row / axis.row_tile * axis.k_steps + column / axis.column_tile;
  float* to = reinterpret_cast<float*>(fragments + fragment * WARP + row % 8 * 4 + column % 4);
  to[(second_row ? 1 : 0) + (second_column ? 2 : 0)] = real;
}

__device__ inline bool same(const Matrix& a, const Matrix& b) {
  return a.data == b.data && a.row == b.row && a.column == b.column && a.rows == b.rows && a.columns == b.columns;
}

// Matrices are read once, in the order of their elements, for all stages that use them or their transposes.
__device__ inline void read_matrices(const Map& map, const Block& block, float4* fragments) {
  const int thread = block.warp * WARP + block.lane;
  for (int i = thread; i < map.fragments * WARP; i += THREADS) fragments[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncthreads();
  for (int s = 0; s < map.own_fragments; ++s) {
    const Matrix& matrix = map.stage[s].axis.matrix;
    bool done = map.stage[s].axis.fragments < 0;
    for (int t = 0; t < s; ++t) {
      const Axis& axis = map.stage[t].axis;
      done = done || (axis.fragments >= 0 && (same(axis.matrix, matrix) || same(axis.matrix.transposed(), matrix)));
    }
    if (done) continue;
    const bool row_by_row = matrix.column <= matrix.row;
    const int inner = row_by_row ? matrix.columns : matrix.rows;
    for (int i = thread; i < matrix.rows * matrix.columns; i += THREADS) {
      const int row = row_by_row ? i / inner : i % inner, column = row_by_row ? i % inner : i / inner;
      const float* from = matrix.data + row * matrix.row + column * matrix.column;
      const float real = *from, imaginary = matrix.part ? from[matrix.part] : 0.0f;
      for (int t = s; t < map.own_fragments; ++t) {
        const Axis& axis = map.stage[t].axis;
        if (axis.fragments < 0) continue;
        float4* to = fragments + axis.fragments * WARP;
        if (same(axis.matrix, matrix)) {
          put_element(axis, row, column, real, imaginary, to);
        } else if (same(axis.matrix.transposed(), matrix)) {
          put_element(axis, column, row, real, imaginary, to);
        }
      }
    }
  }
}

}  // namespace mlip::cuda::spectral
