// What a block keeps in shared memory while it goes through its batch elements (device code only): the weights of its
// channels, its sums of the gradient of the weight, or its channels of the gradients of the bands.
//
// They are rows of 32 channels, a point each, as in a tile; a complex row is two points, real and imaginary part. The
// first `kept` points are in shared memory. The others, which did not fit, are read (and written) in global memory
// wherever they are used: 8 channels by each lane, 16 bytes at a time, and whole sectors of 32 bytes in each access,
// for which lanes next to each other exchange halves. Both ways lead to the same bits.
#pragma once
#include <cuda_pipeline.h>

#include "cuda/spectral/tiles.cuh"

namespace mlip::cuda::spectral {

// A lane's two rows: coefficients, of which the second may be missing, or the real and the imaginary part of one.
struct Rows {
  int label, other_label;
  int64_t channel;  // the first of 8
  int local;        // the same, in the block
  bool one, two;    // whether they are there
  bool odd;         // which half of a point comes first
};

// How many coefficients one of a spectrum stands for: those of half a spectrum have a mirror image, or are their own.
__device__ inline float multiplicity(const Map& map, int label) {
  if (!map.fourier) return 1.0f;
  const int k = label % map.frequencies;
  return k == 0 || 2 * k == map.width ? 1.0f : 2.0f;
}

// They lie between the table and the tiles. No pointer is kept to them: that would take registers.
__device__ inline float* kept_points(const Map& map) {
  extern __shared__ float4 shared[];
  return reinterpret_cast<float*>(shared + map.fragments * WARP) + table_entries(map);
}

// --- all of them, once -----------------------------------------------------------------------------------------------

// Calls `each` with every kept number and where it is in its table [rows, D] or [rows, D, 2].
template <typename Each>
__device__ inline void each_kept(const Map& map, const Block& block, const Each& each) {
  const int parts = map.fourier ? 2 : 1, width = CHANNELS * parts;
  const int64_t stride = map.channels * parts, first = block.first_channel * parts;
  for (int i = block.warp * WARP + block.lane; i < map.kept * CHANNELS; i += THREADS) {
    const int row = i / width, value = i % width;
    float* number = kept_points(map) + at(row * parts + value % parts, value / parts);
    each(number, row * stride + first + value, first + value < stride);
  }
}

// The copies are under way afterwards.
__device__ inline void keep_weights(const Map& map, const Block& block) {
  each_kept(map, block, [&](float* number, int64_t where, bool there) {
    if (there) {
      __pipeline_memcpy_async(number, map.weight + where, sizeof(float));
    } else {
      *number = 0.0f;
    }
  });
  __pipeline_commit();
}

__device__ inline float* sums_of_block(const Map& map) {
  return map.partial + blockIdx.y * (int64_t(map.coefficients) * map.channels * (map.fourier ? 2 : 1));
}

__device__ inline void write_sums(const Map& map, const Block& block) {
  float* sums = sums_of_block(map);
  each_kept(map, block, [&](const float* number, int64_t where, bool there) {
    if (there) sums[where] = *number;
  });
}

__device__ inline void keep_gradients(const Map& map, const Block& block, int64_t b) {
  const int64_t channel = block.first_channel + block.lane, first = b * map.count * map.channels + channel;
#pragma unroll 4
  for (int band = block.warp; band < map.kept; band += WARPS) {
    const bool there = channel < map.channels;
    kept_points(map)[at(band, block.lane)] = there ? element(map.grad, map.type, first + band * map.channels) : 0.0f;
  }
}

// --- rows in global memory -------------------------------------------------------------------------------------------

// 8 numbers of a lane, and the first of a row that two lanes next to each other share: each has every second float4 of
// it, until they are `exchange`d.
struct Chunks {
  int64_t first, distance, end;

  template <typename Access>
  __device__ void each(const Access& access) const {
    if (first < end) access(first, 0);
    if (first + distance < end) access(first + distance, 4);
  }
};

__device__ inline Chunks real_chunks(const Map& map, const Rows& rows, bool odd) {
  return {odd ? rows.channel - 4 : rows.channel, VALUES, map.channels};
}
__device__ inline Chunks complex_chunks(const Map& map, const Rows& rows, bool odd, int half) {
  return {2 * (odd ? rows.channel - VALUES : rows.channel) + 8 * half + (odd ? 4 : 0), 2 * VALUES, 2 * map.channels};
}

__device__ inline void get_chunks(const float* row, const Chunks& chunks, bool there, bool odd,
                                  float (&values)[VALUES]) {
#pragma unroll
  for (int v = 0; v < VALUES; ++v) values[v] = 0.0f;
  if (there) {
    chunks.each([&](int64_t where, int v) {
      const float4 four = *reinterpret_cast<const float4*>(row + where);
      values[v] = four.x, values[v + 1] = four.y, values[v + 2] = four.z, values[v + 3] = four.w;
    });
  }
  exchange(values, odd);
}

__device__ inline void add_chunks(float* row, const Chunks& chunks, bool there, bool odd, bool start,
                                  float (&values)[VALUES]) {
  exchange(values, odd);
  if (!there) return;
  chunks.each([&](int64_t where, int v) {
    float4* sum = reinterpret_cast<float4*>(row + where);
    const float4 before = start ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *sum;
    *sum =
        make_float4(before.x + values[v], before.y + values[v + 1], before.z + values[v + 2], before.w + values[v + 3]);
  });
}

__device__ inline void get_real(const Map& map, const float* row, const Rows& rows, bool there, bool odd,
                                float (&values)[VALUES]) {
  if (map.row_vector) return get_chunks(row, real_chunks(map, rows, odd), there, odd, values);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) {
    values[v] = there && rows.channel + v < map.channels ? row[rows.channel + v] : 0.0f;
  }
}

__device__ inline void add_real(const Map& map, float* row, const Rows& rows, bool there, bool odd, bool start,
                                float (&values)[VALUES]) {
  if (map.row_vector) return add_chunks(row, real_chunks(map, rows, odd), there, odd, start, values);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) {
    if (!there || rows.channel + v >= map.channels) break;
    float* sum = row + rows.channel + v;
    *sum = (start ? 0.0f : *sum) + values[v];
  }
}

// Half of a lane's channels: real, imaginary, real, and so on.
__device__ inline void get_complex(const Map& map, const float* row, const Rows& rows, int half, bool there, bool odd,
                                   float (&values)[VALUES]) {
  if (map.row_vector) return get_chunks(row, complex_chunks(map, rows, odd, half), there, odd, values);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) {
    const int64_t where = 2 * rows.channel + VALUES * half + v;
    values[v] = there && where < 2 * map.channels ? row[where] : 0.0f;
  }
}

__device__ inline void add_complex(const Map& map, float* row, const Rows& rows, bool there, bool odd, bool start,
                                   const float (&real)[VALUES], const float (&imaginary)[VALUES]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float values[VALUES];
#pragma unroll
    for (int v = 0; v < VALUES / 2; ++v) {
      values[2 * v] = real[half * VALUES / 2 + v], values[2 * v + 1] = imaginary[half * VALUES / 2 + v];
    }
    if (map.row_vector) {
      add_chunks(row, complex_chunks(map, rows, odd, half), there, odd, start, values);
      continue;
    }
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      const int64_t where = 2 * rows.channel + VALUES * half + v;
      if (!there || where >= 2 * map.channels) break;
      row[where] = (start ? 0.0f : row[where]) + values[v];
    }
  }
}

// --- what becomes of products ----------------------------------------------------------------------------------------

// All lanes of a warp have to come to these, for the exchanges.

__device__ inline void apply_weights(const Map& map, const Rows& rows, float (&one)[VALUES], float (&other)[VALUES]) {
  const bool odd_lane = rows.local & VALUES;
  float weight[VALUES] = {};
  if (!map.fourier) {
    const bool all = map.kept >= map.coefficients, kept = rows.label < map.kept,
               other_kept = rows.other_label < map.kept;
    if (!all) get_real(map, map.weight + rows.label * map.channels, rows, rows.one && !kept, odd_lane, weight);
    if (rows.one && kept) get_point(kept_points(map), rows.label, rows.local, rows.odd, weight);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) one[v] *= weight[v];
    if (!all) {
      get_real(map, map.weight + rows.other_label * map.channels, rows, rows.two && !other_kept, odd_lane, weight);
    }
    if (rows.two && other_kept) get_point(kept_points(map), rows.other_label, rows.local, rows.odd, weight);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) other[v] *= weight[v];
    return;
  }
  const int point = 2 * rows.label;
  const bool kept = point < map.kept;
  const float* row = map.weight + rows.label * map.channels * 2;
  const float times = multiplicity(map, rows.label);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // registers are too few for all 8 channels
    if (map.kept < 2 * map.coefficients) get_complex(map, row, rows, half, rows.one && !kept, odd_lane, weight);
    if (rows.one && kept) {
      const float4 real = *reinterpret_cast<const float4*>(kept_points(map) + at(point, rows.local) + 4 * half);
      const float4 imaginary =
          *reinterpret_cast<const float4*>(kept_points(map) + at(point + 1, rows.local) + 4 * half);
      weight[0] = real.x, weight[2] = real.y, weight[4] = real.z, weight[6] = real.w;
      weight[1] = imaginary.x, weight[3] = imaginary.y, weight[5] = imaginary.z, weight[7] = imaginary.w;
    }
#pragma unroll
    for (int v = 0; v < VALUES / 2; ++v) {
      float &a = one[half * 4 + v], &b = other[half * 4 + v];
      const float real = times * (a * weight[2 * v] - b * weight[2 * v + 1]);
      b = times * (a * weight[2 * v + 1] + b * weight[2 * v]);
      a = real;
    }
  }
}

// Adds to the sum of one point, or starts it.
__device__ inline void add_kept(const Map& map, int point, const Rows& rows, bool start,
                                const float (&values)[VALUES]) {
  float sum[VALUES] = {};
  if (!start) get_point(kept_points(map), point, rows.local, rows.odd, sum);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) sum[v] += values[v];
  put_point(kept_points(map), point, rows.local, rows.odd, sum);
}

// Adds x's coefficients times those of the gradient. No product is fused with its sum, which not every way could do.
__device__ inline void add_products(const Map& map, const Rows& rows, bool start, float (&one)[VALUES],
                                    float (&other)[VALUES], const float (&x_one)[VALUES],
                                    const float (&x_other)[VALUES]) {
  const bool odd_lane = rows.local & VALUES;
  float* sums = sums_of_block(map);
  if (!map.fourier) {
    const bool all = map.kept >= map.coefficients, kept = rows.label < map.kept,
               other_kept = rows.other_label < map.kept;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      one[v] = __fmul_rn(one[v], x_one[v]), other[v] = __fmul_rn(other[v], x_other[v]);
    }
    if (rows.one && kept) add_kept(map, rows.label, rows, start, one);
    if (rows.two && other_kept) add_kept(map, rows.other_label, rows, start, other);
    if (all) return;
    add_real(map, sums + rows.label * map.channels, rows, rows.one && !kept, odd_lane, start, one);
    add_real(map, sums + rows.other_label * map.channels, rows, rows.two && !other_kept, odd_lane, start, other);
    return;
  }
  const int point = 2 * rows.label;
  const bool kept = point < map.kept;
  const float times = multiplicity(map, rows.label);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) {
    const float real = __fmul_rn(times, one[v] * x_one[v] + other[v] * x_other[v]);
    other[v] = __fmul_rn(times, other[v] * x_one[v] - one[v] * x_other[v]);
    one[v] = real;
  }
  if (rows.one && kept) {
    add_kept(map, point, rows, start, one);
    add_kept(map, point + 1, rows, start, other);
  }
  if (map.kept >= 2 * map.coefficients) return;
  add_complex(map, sums + rows.label * map.channels * 2, rows, rows.one && !kept, odd_lane, start, one, other);
}

// A lane's 8 channels of the gradient of a band; 0 where the coefficient is in none.
__device__ inline void gradient_of(const Map& map, int64_t b, int band, const Rows& rows, float (&values)[VALUES]) {
  if (0 <= band && band < map.kept) return get_point(kept_points(map), band, rows.local, rows.odd, values);
  const bool there = band >= 0 && band < map.count;
  const int64_t first = (b * map.count + band) * map.channels + rows.channel, left = map.channels - rows.channel;
#pragma unroll
  for (int v = 0; v < VALUES; ++v) values[v] = 0.0f;
  if (!there) return;
  if (!map.row_vector) {
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      if (v < left) values[v] = element(map.grad, map.type, first + v);
    }
  } else if (map.type == Type::float32) {
#pragma unroll
    for (int v = 0; v < VALUES; v += 4) {
      if (v >= left) break;
      const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(map.grad) + first + v);
      values[v] = four.x, values[v + 1] = four.y, values[v + 2] = four.z, values[v + 3] = four.w;
    }
  } else if (left > 0) {
    unpack(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(map.grad) + first)[0], map.type, values);
  }
}

}  // namespace mlip::cuda::spectral
