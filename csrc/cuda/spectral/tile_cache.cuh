// Memory of a block (device code only): matrices as the fragments that tensor cores multiply, tiles of tokens, and rows
// that the block caches while it goes through its batch elements: the weights of its channels, its sums of the gradient
// of the weight, or its channels of the gradients of the bands.
//
// Tiles and cached rows are points of 32 channels in shared memory, as float32. A cached row is one point, a complex
// one two: real and imaginary part. The first `cached_points` points are in shared memory. The others, which did not
// fit, are read (and written) in global memory wherever they are used: 8 channels by each lane, 16 bytes at a time, and
// whole sectors of 32 bytes in each access, for which lanes next to each other exchange halves. Both ways lead to the
// same bits.
#pragma once
#include <cuda_pipeline.h>

#include "cuda/spectral/spectral.h"

namespace mlip::cuda::spectral {

constexpr int VALUES = 8;  // channels of a lane in a product
constexpr int LOADS = 4;   // in flight

// Shared memory has the matrices as fragments, the table, the cached rows, the tiles.
struct Block {
  const float4* fragments;
  const void* table;  // frequency mask or bands of the coefficients
  float* tiles;
  int tile_floats;
  int64_t first_channel;
  int lane, warp;

  __device__ float* tile(int number) const { return tiles + int64_t(number) * tile_floats; }
};

// No pointer is kept to the cached rows: that would take registers.
__device__ inline float* cached_rows(const SpectralProblem& p) {
  extern __shared__ float4 shared[];
  return reinterpret_cast<float*>(shared + p.fragments * WARP) + table_entries(p);
}

// Where a channel of a point is: groups of 8 channels are permuted by the number of the point.
__device__ inline int at(int point, int channel) {
  return point * CHANNELS + (((channel / 8 ^ point) & 3) * 8) + channel % 8;
}

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
  const float4 first = *reinterpret_cast<const float4*>(from + (odd ? 4 : 0));
  const float4 second = *reinterpret_cast<const float4*>(from + (odd ? 0 : 4));
  const float4 low = odd ? second : first, high = odd ? first : second;
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// --- elements of any type in global memory ---------------------------------------------------------------------------

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

__device__ inline void unpack(const uint4& raw, Type type, float (&values)[VALUES]) {
  if (type == Type::float16) {
    load<VALUES>(reinterpret_cast<const __half*>(&raw), values);
  } else {
    load<VALUES>(reinterpret_cast<const __nv_bfloat16*>(&raw), values);
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

// --- matrices --------------------------------------------------------------------------------------------------------

// What a lane has of a fragment, straight from global memory.
__device__ inline float4 fragment_of(const AxisTransform& axis, int m, int k, int lane) {
  const int row = m * axis.row_tile + lane / 4, column = k * axis.column_tile + lane % 4;
  const int second_row = row + axis.row_pair, second_column = column + axis.column_pair;
  const bool r = row < axis.row_limit, c = column < axis.column_limit;
  const Matrix& matrix = axis.matrix;
  const float* from = matrix.data + row * matrix.row + column * matrix.column;
  if (axis.sign != 0.0f) {
    const float real = r && c ? *from : 0.0f, imaginary = r && c ? axis.sign * from[matrix.part] : 0.0f;
    return make_float4(real, imaginary, -imaginary, real);
  }
  const bool rr = r && second_row < axis.rows, cc = c && second_column < axis.columns;
  const int64_t down = axis.row_pair * matrix.row, right = axis.column_pair * matrix.column;
  return make_float4(r && c ? *from : 0.0f, rr && c ? from[down] : 0.0f, r && cc ? from[right] : 0.0f,
                     rr && cc ? from[down + right] : 0.0f);
}

// Puts an element of a matrix where its fragment is.
__device__ inline void put_element(const AxisTransform& axis, int row, int column, float real, float imaginary,
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

// Matrices are read once, in the order of their elements, for all passes that use them or their transposes.
__device__ inline void read_matrices(const SpectralProblem& p, const Block& block, float4* fragments) {
  const int thread = block.warp * WARP + block.lane;
  for (int i = thread; i < p.fragments * WARP; i += THREADS) fragments[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncthreads();
  for (int s = 0; s < p.own_fragments; ++s) {
    const Matrix& matrix = p.passes[s].axis.matrix;
    bool done = p.passes[s].axis.fragments < 0;
    for (int t = 0; t < s; ++t) {
      const AxisTransform& axis = p.passes[t].axis;
      done = done || (axis.fragments >= 0 && (same(axis.matrix, matrix) || same(axis.matrix.transposed(), matrix)));
    }
    if (done) continue;
    const bool row_by_row = matrix.column <= matrix.row;
    const int inner = row_by_row ? matrix.columns : matrix.rows;
    for (int i = thread; i < matrix.rows * matrix.columns; i += THREADS) {
      const int row = row_by_row ? i / inner : i % inner, column = row_by_row ? i % inner : i / inner;
      const float* from = matrix.data + row * matrix.row + column * matrix.column;
      const float real = *from, imaginary = matrix.part ? from[matrix.part] : 0.0f;
      for (int t = s; t < p.own_fragments; ++t) {
        const AxisTransform& axis = p.passes[t].axis;
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

// --- tokens ----------------------------------------------------------------------------------------------------------

// Rows of tokens become points of a tile, from point `first` of each row of the tile on.
__device__ inline void read(const SpectralProblem& p, const Block& block, const Tokens& tokens, int64_t b, int skipped,
                            int first, float* tile) {
  const int points = p.height * p.row_points, thread = block.warp * WARP + block.lane;
  const int64_t start = b * tokens.stride_batch + skipped * tokens.stride_token + block.first_channel;
  const auto point_of = [&](int n) {
    return p.row_points == 1 ? n * p.pitch + first : n / p.row_points * p.pitch + n % p.row_points + first;
  };
  if (!tokens.vector) {
    for (int n = block.warp; n < points; n += WARPS) {
      const bool in_bounds = block.first_channel + block.lane < p.channels;
      const int64_t from = start + n * tokens.stride_token + block.lane;
      tile[at(point_of(n), block.lane)] = in_bounds ? element(tokens.data, p.type, from) : 0.0f;
    }
    return;
  }
  const bool single = p.type == Type::float32;
  const int shift = single ? 3 : 2, vector = single ? 4 : 8;  // accesses for each row, channels in each
  const int channel = (thread & ((1 << shift) - 1)) * vector, step = THREADS >> shift;
  const bool in_bounds = block.first_channel + channel < p.channels;
  for (int n = thread >> shift; n < points; n += LOADS * step) {
    uint4 raw[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      raw[i] = make_uint4(0, 0, 0, 0);
      if (!in_bounds || n + i * step >= points) continue;
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
        unpack(raw[i], p.type, values);
        put_point(tile, point, channel, thread >> 2 & 1, values);
      }
    }
  }
}

__device__ inline void write_prefix(const SpectralProblem& p, const Block& block, int64_t b) {
  const int64_t channel = block.first_channel + block.lane;
  if (channel >= p.channels) return;
  for (int n = block.warp; n < p.prefix; n += WARPS) {
    const int64_t from = b * p.x.stride_batch + n * p.x.stride_token + channel;
    const float value = p.copy_prefix ? element(p.x.data, p.type, from) : 0.0f;
    put(p.out, p.type, (b * p.out_tokens + n) * p.channels + channel, value);
  }
}

// --- cached rows, all of them ----------------------------------------------------------------------------------------

// Calls `each` with every cached number and where it is in its tensor [rows, D] or [rows, D, 2].
template <typename Each>
__device__ inline void each_cached(const SpectralProblem& p, const Block& block, const Each& each) {
  const int parts = p.fourier ? 2 : 1, width = CHANNELS * parts;
  const int64_t stride = p.channels * parts, first = block.first_channel * parts;
  for (int i = block.warp * WARP + block.lane; i < p.cached_points * CHANNELS; i += THREADS) {
    const int row = i / width, value = i % width;
    float* number = cached_rows(p) + at(row * parts + value % parts, value / parts);
    each(number, row * stride + first + value, first + value < stride);
  }
}

// The copies are under way afterwards.
__device__ inline void cache_weights(const SpectralProblem& p, const Block& block) {
  each_cached(p, block, [&](float* number, int64_t position, bool in_bounds) {
    if (in_bounds) {
      __pipeline_memcpy_async(number, p.weight + position, sizeof(float));
    } else {
      *number = 0.0f;
    }
  });
  __pipeline_commit();
}

__device__ inline float* sums_of_block(const SpectralProblem& p) {
  return p.partial + blockIdx.y * (int64_t(p.coefficients) * p.channels * (p.fourier ? 2 : 1));
}

__device__ inline void write_sums(const SpectralProblem& p, const Block& block) {
  float* sums = sums_of_block(p);
  each_cached(p, block, [&](const float* number, int64_t position, bool in_bounds) {
    if (in_bounds) sums[position] = *number;
  });
}

__device__ inline void cache_band_gradients(const SpectralProblem& p, const Block& block, int64_t b) {
  const int64_t channel = block.first_channel + block.lane, first = b * p.band_count * p.channels + channel;
#pragma unroll 4
  for (int band = block.warp; band < p.cached_points; band += WARPS) {
    const bool in_bounds = channel < p.channels;
    cached_rows(p)[at(band, block.lane)] = in_bounds ? element(p.grad, p.type, first + band * p.channels) : 0.0f;
  }
}

// --- rows that are not cached ----------------------------------------------------------------------------------------

// 8 numbers of a lane in a row [D] or [D, 2], of which a lane's 8 channels are two halves. By vectors, lanes next to
// each other share 16 numbers: each has every second float4 of them, until they are `exchange`d.
struct Span {
  int64_t own, first, distance, end;

  __device__ Span(const SpectralProblem& p, int64_t channel, int parts, int half, bool odd)
      : own(parts * channel + VALUES * half),
        first(parts * (odd ? channel - VALUES : channel) + VALUES * half + (odd ? 4 : 0)),
        distance(VALUES * parts),
        end(parts * p.channels) {}

  template <typename Access>
  __device__ void each_vector(const Access& access) const {
    if (first < end) access(first, 0);
    if (first + distance < end) access(first + distance, 4);
  }
};

__device__ inline void get_row(const SpectralProblem& p, const float* row, const Span& span, bool wanted, bool odd,
                               float (&values)[VALUES]) {
  if (p.row_vector) {
#pragma unroll
    for (int v = 0; v < VALUES; ++v) values[v] = 0.0f;
    if (wanted) {
      span.each_vector([&](int64_t position, int v) {
        const float4 four = *reinterpret_cast<const float4*>(row + position);
        values[v] = four.x, values[v + 1] = four.y, values[v + 2] = four.z, values[v + 3] = four.w;
      });
    }
    return exchange(values, odd);
  }
#pragma unroll
  for (int v = 0; v < VALUES; ++v) values[v] = wanted && span.own + v < span.end ? row[span.own + v] : 0.0f;
}

// row += values, or row = values at the `start`.
__device__ inline void add_row(const SpectralProblem& p, float* row, const Span& span, bool wanted, bool odd,
                               bool start, float (&values)[VALUES]) {
  if (p.row_vector) {
    exchange(values, odd);
    if (!wanted) return;
    return span.each_vector([&](int64_t position, int v) {
      float4* sum = reinterpret_cast<float4*>(row + position);
      const float4 before = start ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *sum;
      *sum = make_float4(before.x + values[v], before.y + values[v + 1], before.z + values[v + 2],
                         before.w + values[v + 3]);
    });
  }
#pragma unroll
  for (int v = 0; v < VALUES; ++v) {
    if (!wanted || span.own + v >= span.end) break;
    float* sum = row + span.own + v;
    *sum = (start ? 0.0f : *sum) + values[v];
  }
}

}  // namespace mlip::cuda::spectral
