// How passes are executed (device code only): by blocks of 4 warps, each with 32 channels of one batch element at a
// time.
//
// A block reads its tokens once, 16 bytes at a time, into a tile in shared memory, as float32. A pass multiplies every
// line of the tile (a row or a column of the grid) by a matrix on the tensor cores; a warp has a whole line, or up to
// 64 rows of the product, in registers, and so can put the product where the line was. The last pass writes the result,
// 16 bytes at a time. All in between, such as a weight for each coefficient, happens in registers; tile_cache.cuh tells
// where the weight comes from.
//
// With n the column of b in elements.h and j = 0..3 one of four products, the channel is 4 n + j: a lane reads 4
// channels that lie together, and has products for 8 that lie together. Groups of 8 channels are permuted by the number
// of the point, and points below each other are an odd number apart: no access has bank conflicts.
//
// A tile that shared memory cannot hold is in a workspace in global memory, one for each block. Sums over more than 64
// products are made in parts of 32, since tensor cores round towards zero when they add.
#pragma once
#include "cuda/spectral/tile_cache.cuh"

namespace mlip::cuda::spectral {

constexpr int PRODUCTS = 4;        // with 8 channels each
constexpr int ROW_TILES = 4;       // of 16 rows, which a warp has in registers
constexpr int STEPS_TOGETHER = 4;  // of a long sum

constexpr unsigned bit(Output output) { return 1u << int(output); }

// --- what becomes of products ----------------------------------------------------------------------------------------

// Two rows of products of a lane, in 8 channels: coefficients or tokens, of which the second may be missing, or the
// real and the imaginary part of one coefficient.
struct RowPair {
  int label, second_label;
  int64_t channel;  // the first of 8
  int local;        // the same, in the block
  bool has_first, has_second;
  bool odd;  // which half of a point comes first
};

// How many coefficients one of a spectrum stands for: those of half a spectrum have a mirror image, or are their own.
__device__ inline float multiplicity(const SpectralProblem& p, int label) {
  if (!p.fourier) return 1.0f;
  const int k = label % p.frequencies;
  return k == 0 || 2 * k == p.width ? 1.0f : 2.0f;
}

// By all lanes of a warp, for the exchanges.
__device__ inline void apply_weights(const SpectralProblem& p, const RowPair& rows, float (&first)[VALUES],
                                     float (&second)[VALUES]) {
  const bool odd_lane = rows.local & VALUES;
  float weight[VALUES] = {};
  if (!p.fourier) {
    const Span span(p, rows.channel, 1, 0, odd_lane);
    const bool all = p.cached_points >= p.coefficients, cached = rows.label < p.cached_points,
               second_cached = rows.second_label < p.cached_points;
    if (!all) get_row(p, p.weight + rows.label * p.channels, span, rows.has_first && !cached, odd_lane, weight);
    if (rows.has_first && cached) get_point(cached_rows(p), rows.label, rows.local, rows.odd, weight);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) first[v] *= weight[v];
    if (!all) {
      const float* row = p.weight + rows.second_label * p.channels;
      get_row(p, row, span, rows.has_second && !second_cached, odd_lane, weight);
    }
    if (rows.has_second && second_cached) get_point(cached_rows(p), rows.second_label, rows.local, rows.odd, weight);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) second[v] *= weight[v];
    return;
  }
  const int point = 2 * rows.label;
  const bool cached = point < p.cached_points;
  const float* row = p.weight + rows.label * p.channels * 2;
  const float times = multiplicity(p, rows.label);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // registers are too few for all 8 channels
    if (p.cached_points < 2 * p.coefficients) {
      get_row(p, row, Span(p, rows.channel, 2, half, odd_lane), rows.has_first && !cached, odd_lane, weight);
    }
    if (rows.has_first && cached) {
      const float4 real = *reinterpret_cast<const float4*>(cached_rows(p) + at(point, rows.local) + 4 * half);
      const float4 imaginary = *reinterpret_cast<const float4*>(cached_rows(p) + at(point + 1, rows.local) + 4 * half);
      weight[0] = real.x, weight[2] = real.y, weight[4] = real.z, weight[6] = real.w;
      weight[1] = imaginary.x, weight[3] = imaginary.y, weight[5] = imaginary.z, weight[7] = imaginary.w;
    }
#pragma unroll
    for (int v = 0; v < VALUES / 2; ++v) {
      float &a = first[half * 4 + v], &b = second[half * 4 + v];
      const float real = times * (a * weight[2 * v] - b * weight[2 * v + 1]);
      b = times * (a * weight[2 * v + 1] + b * weight[2 * v]);
      a = real;
    }
  }
}

// Adds to the sum of one point, or starts it.
__device__ inline void add_cached(const SpectralProblem& p, int point, const RowPair& rows, bool start,
                                  const float (&values)[VALUES]) {
  float sum[VALUES] = {};
  if (!start) get_point(cached_rows(p), point, rows.local, rows.odd, sum);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) sum[v] += values[v];
  put_point(cached_rows(p), point, rows.local, rows.odd, sum);
}

// Adds x's coefficients times those of the gradient. No product is fused with its sum, which not every way could do. By
// all lanes of a warp.
__device__ inline void add_products(const SpectralProblem& p, const RowPair& rows, bool start, float (&first)[VALUES],
                                    float (&second)[VALUES], const float (&x_first)[VALUES],
                                    const float (&x_second)[VALUES]) {
  const bool odd_lane = rows.local & VALUES;
  float* sums = sums_of_block(p);
  if (!p.fourier) {
    const Span span(p, rows.channel, 1, 0, odd_lane);
    const bool all = p.cached_points >= p.coefficients, cached = rows.label < p.cached_points,
               second_cached = rows.second_label < p.cached_points;
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      first[v] = __fmul_rn(first[v], x_first[v]), second[v] = __fmul_rn(second[v], x_second[v]);
    }
    if (rows.has_first && cached) add_cached(p, rows.label, rows, start, first);
    if (rows.has_second && second_cached) add_cached(p, rows.second_label, rows, start, second);
    if (all) return;
    add_row(p, sums + rows.label * p.channels, span, rows.has_first && !cached, odd_lane, start, first);
    add_row(p, sums + rows.second_label * p.channels, span, rows.has_second && !second_cached, odd_lane, start, second);
    return;
  }
  const int point = 2 * rows.label;
  const bool cached = point < p.cached_points;
  const float times = multiplicity(p, rows.label);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) {
    const float real = __fmul_rn(times, first[v] * x_first[v] + second[v] * x_second[v]);
    second[v] = __fmul_rn(times, second[v] * x_first[v] - first[v] * x_second[v]);
    first[v] = real;
  }
  if (rows.has_first && cached) {
    add_cached(p, point, rows, start, first);
    add_cached(p, point + 1, rows, start, second);
  }
  if (p.cached_points >= 2 * p.coefficients) return;
  float* row = sums + rows.label * p.channels * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float values[VALUES];
#pragma unroll
    for (int v = 0; v < VALUES / 2; ++v) {
      values[2 * v] = first[half * VALUES / 2 + v], values[2 * v + 1] = second[half * VALUES / 2 + v];
    }
    add_row(p, row, Span(p, rows.channel, 2, half, odd_lane), rows.has_first && !cached, odd_lane, start, values);
  }
}

// A lane's 8 channels of the gradient of a band; 0 where the coefficient is in none.
__device__ inline void gradient_of(const SpectralProblem& p, int64_t b, int band, const RowPair& rows,
                                   float (&values)[VALUES]) {
  if (0 <= band && band < p.cached_points) return get_point(cached_rows(p), band, rows.local, rows.odd, values);
  const bool exists = band >= 0 && band < p.band_count;
  const int64_t first = (b * p.band_count + band) * p.channels + rows.channel, left = p.channels - rows.channel;
#pragma unroll
  for (int v = 0; v < VALUES; ++v) values[v] = 0.0f;
  if (!exists) return;
  if (!p.row_vector) {
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      if (v < left) values[v] = element(p.grad, p.type, first + v);
    }
  } else if (p.type == Type::float32) {
#pragma unroll
    for (int v = 0; v < VALUES; v += 4) {
      if (v >= left) break;
      const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(p.grad) + first + v);
      values[v] = four.x, values[v + 1] = four.y, values[v + 2] = four.z, values[v + 3] = four.w;
    }
  } else if (left > 0) {
    unpack(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.grad) + first)[0], p.type, values);
  }
}

// Multiplies by twice the gradient of the band of a coefficient.
__device__ inline void apply_band_gradient(const SpectralProblem& p, const Block& block, int64_t b, int label,
                                           const RowPair& rows, float (&values)[VALUES]) {
  float gradient[VALUES];
  gradient_of(p, b, static_cast<const int*>(block.table)[label], rows, gradient);
  const float twice = 2.0f * multiplicity(p, label);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) values[v] *= twice * gradient[v];
}

// A factor for the 8 channels of a coefficient or token.
__device__ inline float factor_of(const SpectralProblem& p, const Block& block, Output output, int64_t b, int label) {
  if (output == Output::scaled) {
    return 2.0f * static_cast<const float*>(p.grad)[b * p.out_tokens + p.prefix + label];
  }
  return static_cast<const float*>(block.table)[label] * multiplicity(p, label);
}

// Products of a lane: row `index` of line `line`, and its partner, in 8 channels each. By all lanes of a warp.
template <unsigned OUTPUTS>
__device__ inline void put_products(const SpectralProblem& p, const Block& block, const Pass& pass, int64_t b,
                                    bool start, int line, int index, bool has_first, bool has_second,
                                    float (&first)[VALUES], float (&second)[VALUES]) {
  const Output output = pass.output;
  int lane = block.lane;
  asm volatile("" : "+r"(lane));  // so that nothing below is computed beforehand and occupies registers
  const int local = lane % 4 * VALUES, point = line * pass.out.line + index * pass.out.step;
  const int64_t channel = block.first_channel + local;
  const int label = line * pass.label.line + index * pass.label.step, second_label = label + pass.label.pair;
  const bool odd = lane >> 2 & 1;
  const RowPair rows{label, second_label, channel, local, has_first, has_second, odd};
  if constexpr ((OUTPUTS & bit(Output::energies)) != 0) {
    if (output == Output::energies) {  // the lanes of a row add theirs
      float sums[2] = {};
      for (int v = 0; v < VALUES; ++v) sums[0] += first[v] * first[v], sums[1] += second[v] * second[v];
      for (int i = 0; i < 2; ++i) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
      }
      float* energies = p.partial + (blockIdx.x * p.batch + b) * (p.out_tokens - p.prefix);
      const int which = block.lane % 4;  // one store for both rows, whose tokens lie together
      if (which == 0 ? has_first : which == 1 && has_second) {
        energies[which ? second_label : label] = which ? sums[1] : sums[0];
      }
      return;
    }
  }
  if constexpr ((OUTPUTS & (bit(Output::tokens) | bit(Output::spectrum))) != 0) {
    if ((output == Output::tokens || output == Output::spectrum) && p.out_vector && p.type == Type::float32) {
      exchange(first, block.lane & 1);
      exchange(second, block.lane & 1);
    }
  }
  if constexpr ((OUTPUTS & bit(Output::products)) != 0) {
    if (output == Output::products) {
      float x_first[VALUES] = {}, x_second[VALUES] = {};
      if (has_first) get_point(block.tile(pass.to), point, local, odd, x_first);
      if (has_second) get_point(block.tile(pass.to), point + pass.out.pair, local, odd, x_second);
      add_products(p, rows, start, first, second, x_first, x_second);
      return;
    }
  }
  if constexpr ((OUTPUTS & bit(Output::weighted)) != 0) {
    if (output == Output::weighted) apply_weights(p, rows, first, second);
  }
  if (!has_first) return;
  if constexpr ((OUTPUTS & bit(Output::tokens)) != 0) {
    if (output == Output::tokens) {
      const int64_t row = (b * p.out_tokens + p.prefix + label) * p.channels;
      put_row(p.out, p.type, p.out_vector, row, channel, p.channels, first);
      const int64_t second_row = row + pass.label.pair * p.channels;
      if (has_second) put_row(p.out, p.type, p.out_vector, second_row, channel, p.channels, second);
      return;
    }
  }
  if constexpr ((OUTPUTS & bit(Output::spectrum)) != 0) {
    if (output == Output::spectrum) {
      const int64_t row = (b * p.coefficients + label) * p.channels;
      put_row(p.out, p.type, p.out_vector, row, channel, p.channels, first);
      put_row(p.out_imaginary, p.type, p.out_vector, row, channel, p.channels, second);
      return;
    }
  }
  if constexpr ((OUTPUTS & bit(Output::band_gradients)) != 0) {
    if (output == Output::band_gradients) {
      apply_band_gradient(p, block, b, label, rows, first);
      if (has_second) apply_band_gradient(p, block, b, second_label, rows, second);
    }
  }
  if constexpr ((OUTPUTS & (bit(Output::masked) | bit(Output::scaled))) != 0) {
    if (output == Output::masked || output == Output::scaled) {
      const float factor = factor_of(p, block, output, b, label);
      const float second_factor = has_second && pass.label.pair ? factor_of(p, block, output, b, second_label) : factor;
#pragma unroll
      for (int v = 0; v < VALUES; ++v) first[v] *= factor, second[v] *= second_factor;
    }
  }
  if constexpr ((OUTPUTS & bit(Output::powers)) != 0) {
    if (output == Output::powers) {
      const float times = multiplicity(p, label);
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        first[v] = times * (first[v] * first[v] + (p.fourier ? second[v] * second[v] : 0.0f));
        second[v] *= second[v];
      }
    }
  }
  put_point(block.tile(pass.to), point, local, odd, first);
  if (has_second) put_point(block.tile(pass.to), point + pass.out.pair, local, odd, second);
}

// --- passes ----------------------------------------------------------------------------------------------------------

template <unsigned OUTPUTS>
__device__ inline void run(const SpectralProblem& p, const Block& block, const Pass& pass, int64_t b, bool start) {
  const AxisTransform& axis = pass.axis;
  const float* tile = block.tile(pass.from);
  const bool in_parts = axis.k_steps > 2 * STEPS_TOGETHER;
  const int tiles = in_parts ? ROW_TILES / 2 : ROW_TILES, chunks = (axis.m_tiles + tiles - 1) / tiles;
  const int channel = block.lane / 4 * 4;
  for (int item = block.warp; item < pass.lines * chunks; item += WARPS) {
    const int line = item / chunks, first = item % chunks * tiles;
    float sums[ROW_TILES][PRODUCTS][4] = {};  // in parts: the part of two tiles, then all of them
    for (int k = 0; k < axis.k_steps; ++k) {
      const int index = k * axis.column_tile + block.lane % 4;
      const bool has_first = index < axis.column_limit;
      const bool has_second = has_first && index + axis.column_pair < axis.columns;
      const int point = line * pass.in.line + index * pass.in.step;
      float4 upper = make_float4(0.0f, 0.0f, 0.0f, 0.0f), lower = upper;
      if (has_first) upper = *reinterpret_cast<const float4*>(tile + at(point, channel));
      if (has_second) lower = *reinterpret_cast<const float4*>(tile + at(point + pass.in.pair, channel));
      const float data[PRODUCTS][2] = {{upper.x, lower.x}, {upper.y, lower.y}, {upper.z, lower.z}, {upper.w, lower.w}};
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        if (m >= tiles || first + m >= axis.m_tiles) break;
        const float4 fragment =
            axis.fragments >= 0 ? block.fragments[(axis.fragments + (first + m) * axis.k_steps + k) * WARP + block.lane]
                                : fragment_of(axis, first + m, k, block.lane);
        const Split<4> matrix = split<4>({fragment.x, fragment.y, fragment.z, fragment.w});
#pragma unroll
        for (int j = 0; j < PRODUCTS; ++j) multiply_add(sums[m][j], matrix, split(data[j]), p.exact);
      }
      if (in_parts && (k % STEPS_TOGETHER == STEPS_TOGETHER - 1 || k + 1 == axis.k_steps)) {
#pragma unroll
        for (int i = 0; i < ROW_TILES / 2 * PRODUCTS * 4; ++i) {
          float& part = sums[i / (PRODUCTS * 4)][i / 4 % PRODUCTS][i % 4];
          sums[ROW_TILES / 2 + i / (PRODUCTS * 4)][i / 4 % PRODUCTS][i % 4] += part;
          part = 0.0f;
        }
      }
    }
    __syncwarp();  // the line has been read by all lanes, and may be replaced
    const int offset = in_parts ? ROW_TILES / 2 : 0;
#pragma unroll 1  // one copy of what follows: it is much code
    for (int m = 0; m < tiles && first + m < axis.m_tiles; ++m) {
      const int index = (first + m) * axis.row_tile + block.lane / 4, which_tile = m + offset;
      const bool has_first = index < axis.row_limit;
      const bool has_second = has_first && index + axis.row_pair < axis.rows;
      float rows[2][VALUES];
#pragma unroll
      for (int i = 0; i < 2 * VALUES; ++i) {
        const int j = i % PRODUCTS, which = i / VALUES * 2 + i / PRODUCTS % 2;
        float value = sums[0][j][which];  // registers have no index
#pragma unroll
        for (int t = 1; t < ROW_TILES; ++t) value = which_tile == t ? sums[t][j][which] : value;
        rows[i / VALUES][i % VALUES] = value;
      }
      put_products<OUTPUTS>(p, block, pass, b, start, line, index, has_first, has_second, rows[0], rows[1]);
    }
    __syncwarp();
  }
  __syncthreads();
}

// All that a kernel does, except `finish`, called for each batch element.
template <unsigned OUTPUTS, typename Finish>
__device__ inline void run_passes(const SpectralProblem& p, const Finish& finish) {
  extern __shared__ float4 shared[];
  Block block;
  block.lane = threadIdx.x;
  block.warp = threadIdx.y;
  block.fragments = shared;
  block.tile_floats = p.tile_points * CHANNELS;
  int* const table = reinterpret_cast<int*>(shared + p.fragments * WARP);
  const int* const bands = p.bands ? p.bands : reinterpret_cast<const int*>(p.frequency_mask);
  block.table = p.table ? table : bands;
  block.tiles = cached_rows(p) + p.cached_points * CHANNELS;
  if (p.workspace) {
    block.tiles = p.workspace + (blockIdx.y * int64_t(gridDim.x) + blockIdx.x) * p.tiles * block.tile_floats;
  }
  block.first_channel = blockIdx.x * int64_t(CHANNELS);
  read_matrices(p, block, shared);
  for (int i = block.warp * WARP + block.lane; i < p.table; i += THREADS) table[i] = bands[i];
  if constexpr ((OUTPUTS & bit(Output::weighted)) != 0) cache_weights(p, block);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int skipped = p.out_imaginary || p.imaginary ? 0 : p.prefix;
    read(p, block, p.x, b, p.imaginary ? 0 : p.prefix, 0, block.tile(p.first_tile));
    if (p.imaginary) read(p, block, p.second, b, 0, p.imaginary, block.tile(p.first_tile));
    if constexpr ((OUTPUTS & bit(Output::tokens)) != 0) write_prefix(p, block, b);
    if constexpr ((OUTPUTS & bit(Output::band_gradients)) != 0) cache_band_gradients(p, block, b);
    if constexpr ((OUTPUTS & bit(Output::weighted)) != 0) __pipeline_wait_prior(0);  // for the weights, at first
    __syncthreads();
    for (int s = 0; s < p.num_passes; ++s) {
      if constexpr ((OUTPUTS & bit(Output::products)) != 0) {
        if (s == p.second_begin) {
          read(p, block, p.second, b, skipped, 0, block.tile(p.second_tile));
          __syncthreads();
        }
      }
      run<OUTPUTS>(p, block, p.passes[s], b, b == blockIdx.y);
    }
    finish(p, block, b);
  }
  if constexpr ((OUTPUTS & bit(Output::products)) != 0) write_sums(p, block);
}

}  // namespace mlip::cuda::spectral
