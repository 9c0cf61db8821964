// How stages are executed (device code only): by blocks of 4 warps, each with 32 channels of one batch element at a
// time.
//
// A block reads its tokens once, 16 bytes at a time, into a tile in shared memory, as float32. A stage multiplies every
// line of the tile (a row or a column of the grid) by a matrix on the tensor cores; a warp has a whole line, or up to
// 64 rows of the product, in registers, and so can put the product where the line was. The last stage writes the
// result, 16 bytes at a time. All in between, a weight for each coefficient, say, happens in registers; kept.cuh tells
// where the weight comes from.
//
// With n the column of b in mma.cuh and j = 0..3 one of four products, the channel is 4 n + j: a lane reads 4 channels
// that lie together, and has products for 8 that lie together. Groups of 8 channels are permuted by the number of the
// point, and points below each other are an odd number apart: no access has bank conflicts.
//
// A tile that shared memory cannot hold is in a workspace in global memory, one for each block. Sums over more than 64
// products are made in parts of 32, since tensor cores round towards zero when they add.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/spectral/kept.cuh"
#include "cuda/spectral/stages.h"
#include "cuda/spectral/tiles.cuh"

namespace mlip::cuda::spectral {

constexpr int ROW_TILES = 4;       // of 16 rows, which a warp has in registers
constexpr int STEPS_TOGETHER = 4;  // of a long sum

constexpr unsigned bit(To what) { return 1u << int(what); }

// --- what becomes of products ----------------------------------------------------------------------------------------

// A factor for the 8 channels of a coefficient or token.
__device__ inline float factor_of(const Map& map, const Block& block, To what, int64_t b, int label) {
  if (what == To::scaled) {
    return 2.0f * static_cast<const float*>(map.grad)[b * map.out_tokens + map.prefix + label];
  }
  return static_cast<const float*>(block.table)[label] * multiplicity(map, label);
}

// Twice the gradient of the band of a coefficient.
__device__ inline void share_of(const Map& map, const Block& block, int64_t b, int label, const Rows& rows,
                                float (&values)[VALUES]) {
  float gradient[VALUES];
  gradient_of(map, b, static_cast<const int*>(block.table)[label], rows, gradient);
  const float twice = 2.0f * multiplicity(map, label);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) values[v] *= twice * gradient[v];
}

// Products of a lane: row `index` of line `line`, and its partner if there are `two`, in 8 channels each.
template <unsigned MADE>
__device__ inline void make(const Map& map, const Block& block, const Stage& stage, int64_t b, bool start, int line,
                            int index, bool one_there, bool two, float (&one)[VALUES], float (&other)[VALUES]) {
  const To what = stage.what;
  int lane = block.lane;
  asm volatile("" : "+r"(lane));  // so that nothing below is computed beforehand and occupies registers
  const int local = lane % 4 * VALUES, point = line * stage.out.line + index * stage.out.step;
  const int64_t channel = block.first_channel + local;
  const int label = line * stage.label.line + index * stage.label.step, other_label = label + stage.label.pair;
  const bool odd = lane >> 2 & 1;
  const Rows rows{label, other_label, channel, local, one_there, two, odd};
  if constexpr ((MADE & bit(To::energies)) != 0) {
    if (what == To::energies) {  // the lanes of a row add theirs: all have to come here
      float sums[2] = {};
      for (int v = 0; v < VALUES; ++v) sums[0] += one[v] * one[v], sums[1] += other[v] * other[v];
      for (int i = 0; i < 2; ++i) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
      }
      float* energies = map.partial + (blockIdx.x * map.batch + b) * (map.out_tokens - map.prefix);
      const int which = block.lane % 4;  // one store for both rows, whose tokens lie together
      if (which == 0 ? one_there : which == 1 && two) energies[which ? other_label : label] = which ? sums[1] : sums[0];
      return;
    }
  }
  if constexpr ((MADE & (bit(To::tokens) | bit(To::spectrum))) != 0) {
    if ((what == To::tokens || what == To::spectrum) && map.out_vector && map.type == Type::float32) {
      exchange(one, block.lane & 1);
      exchange(other, block.lane & 1);
    }
  }
  if constexpr ((MADE & bit(To::products)) != 0) {
    if (what == To::products) {
      float x_one[VALUES] = {}, x_other[VALUES] = {};
      if (one_there) get_point(block.tile(stage.to), point, local, odd, x_one);
      if (two) get_point(block.tile(stage.to), point + stage.out.pair, local, odd, x_other);
      add_products(map, rows, start, one, other, x_one, x_other);
      return;
    }
  }
  if constexpr ((MADE & bit(To::weighted)) != 0) {
    if (what == To::weighted) apply_weights(map, rows, one, other);
  }
  if (!one_there) return;
  if constexpr ((MADE & bit(To::tokens)) != 0) {
    if (what == To::tokens) {
      const int64_t row = (b * map.out_tokens + map.prefix + label) * map.channels;
      put_row(map.out, map.type, map.out_vector, row, channel, map.channels, one);
      const int64_t other_row = row + stage.label.pair * map.channels;
      if (two) put_row(map.out, map.type, map.out_vector, other_row, channel, map.channels, other);
      return;
    }
  }
  if constexpr ((MADE & bit(To::spectrum)) != 0) {
    if (what == To::spectrum) {
      const int64_t row = (b * map.coefficients + label) * map.channels;
      put_row(map.out, map.type, map.out_vector, row, channel, map.channels, one);
      put_row(map.out_imaginary, map.type, map.out_vector, row, channel, map.channels, other);
      return;
    }
  }
  if constexpr ((MADE & bit(To::shares)) != 0) {
    if (what == To::shares) {
      share_of(map, block, b, label, rows, one);
      if (two) share_of(map, block, b, other_label, rows, other);
    }
  }
  if constexpr ((MADE & (bit(To::factored) | bit(To::scaled))) != 0) {
    if (what == To::factored || what == To::scaled) {
      const float factor = factor_of(map, block, what, b, label);
      const float other_factor = two && stage.label.pair ? factor_of(map, block, what, b, other_label) : factor;
#pragma unroll
      for (int v = 0; v < VALUES; ++v) one[v] *= factor, other[v] *= other_factor;
    }
  }
  if constexpr ((MADE & bit(To::powers)) != 0) {
    if (what == To::powers) {
      const float times = multiplicity(map, label);
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        one[v] = times * (one[v] * one[v] + (map.fourier ? other[v] * other[v] : 0.0f));
        other[v] *= other[v];
      }
    }
  }
  put_point(block.tile(stage.to), point, local, odd, one);
  if (two) put_point(block.tile(stage.to), point + stage.out.pair, local, odd, other);
}

// --- stages ----------------------------------------------------------------------------------------------------------

template <unsigned MADE>
__device__ inline void run(const Map& map, const Block& block, const Stage& stage, int64_t b, bool start) {
  const Axis& axis = stage.axis;
  const float* tile = block.tile(stage.from);
  const bool in_parts = axis.k_steps > 2 * STEPS_TOGETHER;
  const int tiles = in_parts ? ROW_TILES / 2 : ROW_TILES, chunks = (axis.m_tiles + tiles - 1) / tiles;
  const int channel = block.lane / 4 * 4;
  for (int item = block.warp; item < stage.lines * chunks; item += WARPS) {
    const int line = item / chunks, first = item % chunks * tiles;
    float sums[ROW_TILES][PRODUCTS][4] = {};  // in parts: the part of two tiles, then all of them
    for (int k = 0; k < axis.k_steps; ++k) {
      const int index = k * axis.column_tile + block.lane % 4;
      const bool one = index < axis.column_limit, two = one && index + axis.column_pair < axis.columns;
      const int point = line * stage.in.line + index * stage.in.step;
      float4 upper = make_float4(0.0f, 0.0f, 0.0f, 0.0f), lower = upper;
      if (one) upper = *reinterpret_cast<const float4*>(tile + at(point, channel));
      if (two) lower = *reinterpret_cast<const float4*>(tile + at(point + stage.in.pair, channel));
      const float data[PRODUCTS][2] = {{upper.x, lower.x}, {upper.y, lower.y}, {upper.z, lower.z}, {upper.w, lower.w}};
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        if (m >= tiles || first + m >= axis.m_tiles) break;
        const float4 fragment =
            axis.fragments >= 0 ? block.fragments[(axis.fragments + (first + m) * axis.k_steps + k) * WARP + block.lane]
                                : fragment_of(axis, first + m, k, block.lane);
        const Split<4> matrix = split<4>({fragment.x, fragment.y, fragment.z, fragment.w});
#pragma unroll
        for (int j = 0; j < PRODUCTS; ++j) multiply_add(sums[m][j], matrix, split(data[j]), map.exact);
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
      const bool one = index < axis.row_limit, two = one && index + axis.row_pair < axis.rows;
      float rows[2][VALUES];
#pragma unroll
      for (int i = 0; i < 2 * VALUES; ++i) {
        const int j = i % PRODUCTS, which = i / VALUES * 2 + i / PRODUCTS % 2;
        float value = sums[0][j][which];  // registers have no index
#pragma unroll
        for (int t = 1; t < ROW_TILES; ++t) value = which_tile == t ? sums[t][j][which] : value;
        rows[i / VALUES][i % VALUES] = value;
      }
      make<MADE>(map, block, stage, b, start, line, index, one, two, rows[0], rows[1]);
    }
    __syncwarp();
  }
  __syncthreads();
}

// All of a map but what only one kernel does: `finish` is called for each batch element, with its last tile.
template <unsigned MADE, typename Finish>
__device__ inline void run_stages(const Map& map, const Finish& finish) {
  extern __shared__ float4 shared[];
  Block block;
  block.lane = threadIdx.x;
  block.warp = threadIdx.y;
  block.fragments = shared;
  block.tile_floats = map.tile_points * CHANNELS;
  int* const table = reinterpret_cast<int*>(shared + map.fragments * WARP);
  const int* const bands = map.bands ? map.bands : reinterpret_cast<const int*>(map.factor);
  block.table = map.table ? table : bands;
  block.tiles = kept_points(map) + map.kept * CHANNELS;
  if (map.workspace) {
    block.tiles = map.workspace + (blockIdx.y * int64_t(gridDim.x) + blockIdx.x) * map.tiles * block.tile_floats;
  }
  block.first_channel = blockIdx.x * int64_t(CHANNELS);
  read_matrices(map, block, shared);
  for (int i = block.warp * WARP + block.lane; i < map.table; i += THREADS) table[i] = bands[i];
  if constexpr ((MADE & bit(To::weighted)) != 0) keep_weights(map, block);
  for (int64_t b = blockIdx.y; b < map.batch; b += gridDim.y) {
    const int skipped = map.out_imaginary || map.imaginary ? 0 : map.prefix;
    read(map, block, map.x, b, map.imaginary ? 0 : map.prefix, 0, block.tile(map.first_tile));
    if (map.imaginary) read(map, block, map.second, b, 0, map.imaginary, block.tile(map.first_tile));
    if constexpr ((MADE & bit(To::tokens)) != 0) write_prefix(map, block, b);
    if constexpr ((MADE & bit(To::shares)) != 0) keep_gradients(map, block, b);
    if constexpr ((MADE & bit(To::weighted)) != 0) __pipeline_wait_prior(0);  // for the weights, in the first pass
    __syncthreads();
    for (int s = 0; s < map.stages; ++s) {
      if constexpr ((MADE & bit(To::products)) != 0) {
        if (s == map.second_stages) {
          read(map, block, map.second, b, skipped, 0, block.tile(map.second_tile));
          __syncthreads();
        }
      }
      run<MADE>(map, block, map.stage[s], b, b == blockIdx.y);
    }
    finish(block, b);
  }
  if constexpr ((MADE & bit(To::products)) != 0) write_sums(map, block);
}

// The grid, block and shared memory of `kernel`; called before the launch, to find out whether the tiles fit.
inline bool allow_shared(const void* kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return true;
  const bool allowed = bytes < INT32_MAX && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                                 int(bytes)) == cudaSuccess;
  if (!allowed) cudaGetLastError();
  return allowed;
}

// Bytes of workspace that `kernel` needs for this map.
inline int64_t workspace_bytes(const void* kernel, const Map& map) {
  return allow_shared(kernel, stages_shared(map)) ? 0 : tile_bytes(map) * column_blocks(map) * map.splits;
}

template <typename Kernel>
void launch_stages(Kernel kernel, const Map& map, cudaStream_t stream) {
  const Launch launch = stages_launch(map);
  const int64_t shared = stages_shared(map);
  allow_shared(reinterpret_cast<const void*>(kernel), shared);
  const dim3 grid(unsigned(launch.grid_x), unsigned(launch.grid_y)),
      block(unsigned(launch.block_x), unsigned(launch.block_y));
  kernel<<<grid, block, size_t(shared), stream>>>(map);
}

}  // namespace mlip::cuda::spectral
