// Merging rows of tokens, x [B, N, C] to [B, N', C] with N' = N - r, and the transposed copy back.
//
//   merge     y_o = sum_n w_n x_n over the rows n of output row o, where w_n = size_n / size_o
//   combine   the same with given weights, or with none
//   spread    x_n = w_n y_a(n), with a(n) the output row of input row n, or with no weights y_a(n)
//
//   x, y float32, float16 or bfloat16, unit stride in C      sizes, weights [B, N] float32      maps int64
//
//   kernel    reads                                        writes                               flops
//   merge     B N C x, B (N + N' + r) maps, B N sizes      B N' C y, B N weights, B N' sizes    2 B N C at most
//   combine   the same, with weights for sizes             B N' C y                             2 B N C at most
//   spread    B N' C y (again where it is wanted again,    B N C x                              B N C at most
//             from a cache), B N maps and weights
//
// Bound by memory throughout. A row that nothing is merged into is a copy of bits. The terms of a sum are added in the
// order of the removed rows behind the row that it starts from, product and addition rounded separately as in plain
// PyTorch: no atomics, and the result does not depend on how the work is split.
//
// merge, combine: a block owns up to 256 output rows of one sample. It reads the r removed rows of the sample and lists
// in shared memory, in order, those that belong to its own; then a warp owns an output row. It finds the terms in the
// list by votes and sums 256 channels at a time in registers. Where so much of a long sequence merges into one block
// that the list has no room for it, the votes are over the removed rows themselves.
//
// spread: a warp owns four input rows.
#include "cuda/merging/merging.h"

namespace mlip::cuda::merging {
namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARP * WARPS;
constexpr int BLOCKS = 3;                  // of merge and combine on a multiprocessor
constexpr int MOST_ROWS = 256;             // output rows of a block
constexpr int LISTED = 1024;               // removed rows that a block has room for
constexpr int SPREAD_ROWS = 4;             // rows that a warp of spread owns
constexpr int MOVED = 4;                   // vectors of a row that a lane has in flight
constexpr int64_t BLOCKS_WANTED = 1024;    // a few for each multiprocessor of a large GPU
constexpr int64_t BYTES_PER_REMOVED = 24;  // that a block reads of the maps: no more than it writes of rows

// Vectors of a row that a lane sums at once: 8 numbers, or 4 where a vector is one.
template <int V>
constexpr int SUMMED = V == 1 ? 4 : 8 / V;

int64_t rows_per_block(const MergeRows& p) {
  const int64_t filling = ceil_div(p.batch * p.outputs, BLOCKS_WANTED);
  const int64_t row_bytes = p.channels > 0 ? p.channels * size_of(p.type) : 1;
  const int64_t reading = ceil_div(BYTES_PER_REMOVED * (p.tokens - p.outputs), row_bytes);
  const int64_t rows = ceil_div(filling > reading ? filling : reading, WARPS) * WARPS;
  return rows < WARPS ? WARPS : rows < MOST_ROWS ? rows : MOST_ROWS;
}

// What a lane moves in one access.
template <typename T, int V>
using Bits = std::conditional_t<V == 1, T, uint4>;

// A row number, or the nearest where it is none: no index may lead outside of the tensors.
__device__ inline int64_t within(int64_t row, int64_t rows) { return row < 0 ? 0 : row < rows ? row : rows - 1; }

// to = change(from), by a warp. Loops are not unrolled: nvcc would cut the 16-byte stores to pieces.
template <typename T, int V, typename Change>
__device__ inline void move_row(const T* from, int64_t channels, T* to, Change change) {
#pragma unroll 1
  for (int64_t c = threadIdx.x % WARP * V; c < channels; c += MOVED * WARP * V) {
    Bits<T, V> bits[MOVED];
#pragma unroll
    for (int k = 0; k < MOVED; ++k) {
      const int64_t at = c + k * WARP * V;
      if (at < channels) bits[k] = *reinterpret_cast<const Bits<T, V>*>(from + at);
    }
#pragma unroll
    for (int k = 0; k < MOVED; ++k) {
      const int64_t at = c + k * WARP * V;
      if (at < channels) *reinterpret_cast<Bits<T, V>*>(to + at) = change(bits[k]);
    }
  }
}

template <typename T, int V>
__device__ inline void copy_row(const T* from, int64_t channels, T* to) {
  move_row<T, V>(from, channels, to, [](Bits<T, V> bits) { return bits; });
}

template <typename T, int V>
__device__ inline void scale_row(const T* from, float weight, int64_t channels, T* to) {
  move_row<T, V>(from, channels, to, [weight](Bits<T, V> bits) {
    Pack<T, V> pack;
    memcpy(&pack, &bits, sizeof pack);
#pragma unroll
    for (int v = 0; v < V; ++v) pack.element[v] = narrow<T>(weight * widen(pack.element[v]));
    memcpy(&bits, &pack, sizeof pack);
    return bits;
  });
}

template <typename T, int V>
__device__ inline void clear_row(int64_t channels, T* to) {
#pragma unroll 1
  for (int64_t c = threadIdx.x % WARP * V; c < channels; c += WARP * V) {
    *reinterpret_cast<Bits<T, V>*>(to + c) = Bits<T, V>{};
  }
}

// What a block knows in shared memory. A factor is the size of an input row, and once the block has weighed its rows,
// or from the start where weights are given, its weight.
struct Block {
  int token[MOST_ROWS];         // from which each output row starts
  float factor[MOST_ROWS];      // of that token; 0 if it is masked
  float total[MOST_ROWS];       // merge: size of the output row
  int listed_row[LISTED];       // removed rows: to which output row of the block each belongs,
  int listed_token[LISTED];     // which it is,
  float listed_factor[LISTED];  // and its factor
  int found[WARPS];
};

// What one block computes: `rows` output rows of sample b from `first` on.
template <typename T, int V, bool MERGE>
struct Rows {
  const MergeRows& p;
  Block& shared;
  int64_t b, first;
  int rows, warp, lane;
  const float* factors;  // [B, N], or null: every factor is 1
  int terms;             // removed rows to look through: of the list, or all of the sample
  bool listed;           // which of the two

  __device__ const T* from(int64_t n) const {
    return static_cast<const T*>(p.from) + b * p.stride_batch + n * p.stride_token;
  }
  __device__ float factor_of(int64_t n) const { return factors ? factors[b * p.tokens + n] : 1.0f; }
  __device__ bool dropped(int64_t n) const { return p.dropped && p.dropped[b * p.tokens + n]; }
  __device__ int64_t removed(int k) const { return within(p.removed[b * (p.tokens - p.outputs) + k], p.tokens); }

  // The output row of this block that input row n belongs to, or -1.
  __device__ int row_of(int64_t n) const {
    const int64_t row = p.assignment[b * p.tokens + n] - first;
    return 0 <= row && row < rows ? int(row) : -1;
  }

  __device__ void find_kept() {
    for (int i = threadIdx.x; i < rows; i += THREADS) {
      const int64_t o = b * p.outputs + first + i, n = within(p.kept[o], p.tokens);
      shared.token[i] = int(n);
      shared.factor[i] = MERGE && p.mask && !p.mask[o] ? 0.0f : factor_of(n);
    }
  }

  // Lists the removed rows of the block in order. What is dropped weighs nothing.
  __device__ void find_removed() {
    const int count = int(p.tokens - p.outputs);
    int before = 0;
    for (int begin = 0; begin < count; begin += THREADS) {
      const int k = begin + int(threadIdx.x);
      const int64_t n = k < count ? removed(k) : 0;
      int row = k < count ? row_of(n) : -1;
      if (row >= 0 && dropped(n)) {
        if (MERGE) p.weight[b * p.tokens + n] = 0.0f;
        row = -1;
      }
      const unsigned own = __ballot_sync(~0u, row >= 0);
      if (lane == 0) shared.found[warp] = __popc(own);
      __syncthreads();
      int position = before + __popc(own & ((1u << lane) - 1));
      for (int w = 0; w < WARPS; ++w) {
        if (w < warp) position += shared.found[w];
        before += shared.found[w];
      }
      if (row >= 0 && position < LISTED) {
        shared.listed_row[position] = row;
        shared.listed_token[position] = int(n);
        shared.listed_factor[position] = factor_of(n);
      }
      __syncthreads();  // `found` may be replaced
    }
    listed = before <= LISTED;
    terms = listed ? before : count;
  }

  // Calls `use(token, factor, position)` for the terms behind the first of an output row, in order, by all lanes.
  template <typename Use>
  __device__ void for_each_term(int row, Use use) const {
#pragma unroll 1
    for (int begin = 0; begin < terms; begin += WARP) {
      const int k = begin + lane;
      int token = 0;
      bool own = false;
      if (k < terms) {
        token = listed ? shared.listed_token[k] : int(removed(k));
        own = listed ? shared.listed_row[k] == row : row_of(token) == row && !dropped(token);
      }
      float factor = 0.0f;
      if (own) factor = listed ? shared.listed_factor[k] : factor_of(token);
      for (unsigned owned = __ballot_sync(~0u, own); owned != 0; owned &= owned - 1) {
        const int source = __ffs(owned) - 1;
        use(__shfl_sync(~0u, token, source), __shfl_sync(~0u, factor, source), begin + source);
      }
    }
  }

  // merge: sizes of the output rows, and weights in the place of sizes. A row of size 0 is the row it starts from.
  __device__ void weigh_rows() {
    for (int row = warp; row < rows; row += WARPS) {
      const float size = shared.factor[row];
      float total = size;
      for_each_term(row, [&](int, float factor, int) { total += factor; });
      const float divisor = total > 0.0f ? total : 1.0f;
      for_each_term(row, [&](int n, float factor, int position) {
        if (position % WARP != lane) return;  // the lane that has read this position
        const float weight = factor / divisor;
        p.weight[b * p.tokens + n] = weight;
        if (listed) shared.listed_factor[position] = weight;
      });
      __syncwarp();
      if (lane == 0) {
        shared.total[row] = total;
        shared.factor[row] = total > 0.0f ? size / divisor : 1.0f;
      }
    }
    __syncthreads();  // all rows are weighed
    factors = p.weight;
    for (int i = threadIdx.x; i < rows; i += THREADS) {
      p.merged_size[b * p.outputs + first + i] = shared.total[i];
      p.weight[b * p.tokens + shared.token[i]] = shared.factor[i];
    }
  }

  // Sums over the rows of the output row `row`, each times its weight.
  __device__ void sum_rows(int row, T* to) const {
    constexpr int K = SUMMED<V>;
    for (int64_t c = 0; c < p.channels; c += K * WARP * V) {
      float sums[K][V];
      const auto add = [&](const T* from, float weight, bool start) {
        float values[K][V] = {};
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int64_t at = c + (k * WARP + lane) * V;
          if (at < p.channels) load<V>(from + at, values[k]);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float product = __fmul_rn(weight, values[k][v]);
            sums[k][v] = start ? product : __fadd_rn(sums[k][v], product);
          }
        }
      };
      add(from(shared.token[row]), shared.factor[row], true);
      for_each_term(row, [&](int n, float weight, int) { add(from(n), weight, false); });
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t at = c + (k * WARP + lane) * V;
        if (at < p.channels) store<V>(to + at, sums[k]);
      }
    }
  }

  __device__ void write_rows() const {
    for (int row = warp; row < rows; row += WARPS) {
      bool alone = true;
      for_each_term(row, [&](int, float, int) { alone = false; });
      T* to = static_cast<T*>(p.to) + (b * p.outputs + first + row) * p.channels;
      if (alone && shared.factor[row] == 1.0f) {
        copy_row<T, V>(from(shared.token[row]), p.channels, to);
      } else {
        sum_rows(row, to);
      }
    }
  }
};

template <typename T, int V, bool MERGE>
__device__ inline void merge_block(const MergeRows& p, int rows_per_block) {
  __shared__ Block shared;
  const int64_t blocks = ceil_div(p.outputs, rows_per_block);
  const int64_t b = blockIdx.x / blocks, first = blockIdx.x % blocks * rows_per_block;
  const int rows = int(first + rows_per_block < p.outputs ? rows_per_block : p.outputs - first);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  Rows<T, V, MERGE> block{p, shared, b, first, rows, warp, lane, MERGE ? p.size : p.known_weight, 0, true};
  block.find_kept();
  block.find_removed();
  __syncthreads();  // where nothing is removed, only now all know where rows start
  if (MERGE) block.weigh_rows();
  block.write_rows();
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, BLOCKS) merging_merge_kernel(const MergeRows p, int rows_per_block) {
  merge_block<T, V, true>(p, rows_per_block);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, BLOCKS) merging_combine_kernel(const MergeRows p, int rows_per_block) {
  merge_block<T, V, false>(p, rows_per_block);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) merging_spread_kernel(const MergeRows p) {
  const int64_t total = p.batch * p.tokens;
  const int64_t first = (blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP) * SPREAD_ROWS;
  const int lane = threadIdx.x % WARP;
  // The first lanes read what is to be known of each row of the warp.
  int64_t source = 0;
  float own_weight = 0.0f;
  bool own_dropped = false;
  if (lane < SPREAD_ROWS && first + lane < total) {
    source = within(p.assignment[first + lane], p.outputs);
    own_weight = p.known_weight ? p.known_weight[first + lane] : 1.0f;
    own_dropped = p.dropped && p.dropped[first + lane];
  }
  for (int i = 0; i < SPREAD_ROWS && first + i < total; ++i) {
    const int64_t row = first + i, b = row / p.tokens;
    const int64_t a = __shfl_sync(~0u, source, i);
    const float weight = __shfl_sync(~0u, own_weight, i);
    const bool dropped = __shfl_sync(~0u, own_dropped, i);
    const T* from = static_cast<const T*>(p.from) + b * p.stride_batch + a * p.stride_token;
    T* to = static_cast<T*>(p.to) + row * p.channels;
    if (dropped) {
      clear_row<T, V>(p.channels, to);
    } else if (weight == 1.0f) {
      copy_row<T, V>(from, p.channels, to);
    } else {
      scale_row<T, V>(from, weight, p.channels, to);
    }
  }
}

}  // namespace

int64_t merge_blocks(const MergeRows& p) { return p.batch * ceil_div(p.outputs, rows_per_block(p)); }

int64_t spread_blocks(const MergeRows& p) { return ceil_div(p.batch * p.tokens, WARPS * SPREAD_ROWS); }

void merge_rows(const MergeRows& p, cudaStream_t stream) {
  dispatch(p.type, p.vector, [&](auto element, auto vector) {
    const auto kernel = merging_merge_kernel<decltype(element), decltype(vector)::value>;
    kernel<<<unsigned(merge_blocks(p)), THREADS, 0, stream>>>(p, int(rows_per_block(p)));
  });
}

void combine_rows(const MergeRows& p, cudaStream_t stream) {
  dispatch(p.type, p.vector, [&](auto element, auto vector) {
    const auto kernel = merging_combine_kernel<decltype(element), decltype(vector)::value>;
    kernel<<<unsigned(merge_blocks(p)), THREADS, 0, stream>>>(p, int(rows_per_block(p)));
  });
}

void spread_rows(const MergeRows& p, cudaStream_t stream) {
  dispatch(p.type, p.vector, [&](auto element, auto vector) {
    const auto kernel = merging_spread_kernel<decltype(element), decltype(vector)::value>;
    kernel<<<unsigned(spread_blocks(p)), THREADS, 0, stream>>>(p);
  });
}

}  // namespace mlip::cuda::merging
