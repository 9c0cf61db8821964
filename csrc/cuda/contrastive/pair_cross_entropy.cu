// Cross-entropy over the rows of a matrix of logits l [B, C], or (B = C) the mean of that and the same over its
// columns:
//
//   row i:     log sum_j exp(l_ij) - l_i,label(i)         column j:     log sum_i exp(l_ij) - l_label(j),j
//   dl_ij = grad / 2 (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j) - targets)
//
//   l [B, C] float32, float16 or bfloat16     labels [B] int64     log-sum-exps float32, in two terms each: the largest
//                                                                  logit of a line and the log of the sum below it
//
//   kernel     reads                           writes                                     exponentials
//   tiles      B C l                           B C / 16 (half: / 32) + B C / 8 bytes      2 B C
//                                              of partials
//   finish     the partials, 2 B l             4 B float32                                B C / 128 + B C / 64
//   loss       32 bytes for 256 lines          1 float32
//   backward   B C l, 4 B float32 for each     B C dl                                     2 B C
//              64 rows
//   targets    2 B l, 4 B float32              2 B dl                                     4 B
//
// Bound by memory: beside its 4 (8 with backward) bytes, an element of float32 takes two exponentials. Those of half
// precision are the approximate ones, off by 2^-21 of what they are, and take about as long as the memory does.
//
// tiles: a block owns 64 rows and 512 bytes of each, a warp 8 of the rows; all of that is in registers after one read.
// The rows' largest logits and sums are joined by shuffles, those of columns in shared memory. With smoothing, a row
// also leaves the sum of distances from its largest logit. finish: a thread owns a row or a column and merges what the
// tiles left, in order; the loss of a block's lines is added up in double. loss: one block adds that up in order. No
// atomics: the result is bitwise the same from run to run.
//
// backward writes the softmax terms of all elements; targets then overwrites the 2 B elements that are labels.
#include "cuda/contrastive/contrastive.h"

namespace mlip::cuda::contrastive {
namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARP * WARPS;
constexpr int ROWS_OF_WARP = 8;
constexpr int ROWS = ROWS_OF_WARP * WARPS;
constexpr int SUMS = 4;  // losses, logs, maxima, distances

__device__ constexpr float infinity() { return __builtin_huge_valf(); }
__device__ inline float nan() { return __int_as_float(0x7fffffff); }

template <typename T>
__device__ inline float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}

// What is subtracted before exponentials: the largest logit, where there is one.
__device__ inline float origin(float largest) { return largest == -infinity() ? 0.0f : largest; }

// The columns of a thread: V side by side, or 32 apart where rows do not move 16 bytes at a time.
template <typename T, int V, bool VECTOR>
struct Columns {
  int64_t first, columns;  // first of the thread, and how many there are
  __device__ Columns(int64_t tile, int64_t columns_)
      : first(tile * WARP * V + threadIdx.x % WARP * (VECTOR ? V : 1)), columns(columns_) {}
  __device__ int64_t at(int v) const { return first + v * (VECTOR ? 1 : WARP); }
  __device__ bool has(int v) const { return at(v) < columns; }

  // `otherwise` where no column is
  template <typename E>
  __device__ void read(const E* row, float otherwise, float (&to)[V]) const {
    if (VECTOR) {
      if (has(0)) {
        load<V>(row + first, to);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = otherwise;
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = has(v) ? widen(row[at(v)]) : otherwise;
    }
  }
  __device__ void write(T* row, const float (&from)[V]) const {
    if (VECTOR) {
      if (!has(0)) return;
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.element[v] = narrow<T>(from[v]);
      const uint4 bits = reinterpret_cast<const uint4&>(pack);
      // One access; of an assignment, the compiler makes several here.
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(row + first)), "r"(bits.x),
                   "r"(bits.y), "r"(bits.z), "r"(bits.w)
                   : "memory");
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (has(v)) row[at(v)] = narrow<T>(from[v]);
      }
    }
  }
  // The thread's columns in a tile in shared memory.
  __device__ void put(float* tile, const float (&from)[V]) const {
    const int lane = threadIdx.x % WARP;
    if (VECTOR) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        *reinterpret_cast<float4*>(tile + lane * V + v) = make_float4(from[v], from[v + 1], from[v + 2], from[v + 3]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) tile[lane + v * WARP] = from[v];
    }
  }
  __device__ void get(const float* tile, float (&to)[V]) const {
    const int lane = threadIdx.x % WARP;
    if (VECTOR) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        const float4 four = *reinterpret_cast<const float4*>(tile + lane * V + v);
        to[v] = four.x, to[v + 1] = four.y, to[v + 2] = four.z, to[v + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = tile[lane + v * WARP];
    }
  }
};

template <typename T, int V, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    contrastive_pair_cross_entropy_tiles_forward_kernel(const __grid_constant__ PairCrossEntropy p) {
  __shared__ __align__(16) float parts[WARPS][WARP * V], largest_of_column[WARP * V];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t column_tiles = ceil_div(p.columns, WARP * V), row_tiles = ceil_div(p.rows, ROWS);
  const int64_t column_tile = blockIdx.x % column_tiles, row_tile = blockIdx.x / column_tiles;
  const int64_t first_row = row_tile * ROWS + warp * ROWS_OF_WARP;
  const Columns<T, V, VECTOR> columns(column_tile, p.columns);
  const T* logits = static_cast<const T*>(p.logits);

  float values[ROWS_OF_WARP][V];
#pragma unroll
  for (int r = 0; r < ROWS_OF_WARP; ++r) {
    if (first_row + r < p.rows) {
      columns.read(logits + (first_row + r) * p.stride, -infinity(), values[r]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) values[r][v] = -infinity();
    }
  }

  // Lane r keeps what becomes of row r.
  float own_largest = 0.0f, own_sum = 0.0f, own_distance = 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS_OF_WARP; ++r) {
    float largest = values[r][0];
#pragma unroll
    for (int v = 1; v < V; ++v) largest = fmaxf(largest, values[r][v]);
    for (int apart = WARP / 2; apart > 0; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    const float below = origin(largest);
    float sum = 0.0f, distance = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum += exponential<T>(values[r][v] - below);
      distance += columns.has(v) ? values[r][v] - below : 0.0f;
    }
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
      sum += __shfl_xor_sync(~0u, sum, apart);
      distance += __shfl_xor_sync(~0u, distance, apart);
    }
    own_largest = lane == r ? largest : own_largest;
    own_sum = lane == r ? sum : own_sum;
    own_distance = lane == r ? distance : own_distance;
  }
  if (lane < ROWS_OF_WARP && first_row + lane < p.rows) {
    float* to = p.row_partial + column_tile * p.rows + first_row + lane;
    to[0] = own_largest;
    to[column_tiles * p.rows] = own_sum;
    if (p.label_smoothing != 0) to[2 * column_tiles * p.rows] = own_distance;
  }
  if (!p.both) return;

  float results[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    results[v] = values[0][v];
#pragma unroll
    for (int r = 1; r < ROWS_OF_WARP; ++r) results[v] = fmaxf(results[v], values[r][v]);
  }
  columns.put(parts[warp], results);
  __syncthreads();
  const int own = threadIdx.x;  // of the tile's columns
  const int64_t own_column = column_tile * WARP * V + own;
  float largest = -infinity();
  if (own < WARP * V) {
    for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, parts[w][own]);
    largest_of_column[own] = largest;
  }
  __syncthreads();
  columns.get(largest_of_column, results);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float below = origin(results[v]);
    results[v] = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; ++r) results[v] += exponential<T>(values[r][v] - below);
  }
  columns.put(parts[warp], results);
  __syncthreads();
  if (own < WARP * V && own_column < p.columns) {
    float sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) sum += parts[w][own];
    float* to = p.column_partial + row_tile * p.columns + own_column;
    to[0] = largest;
    to[row_tiles * p.columns] = sum;
  }
}

// Adds up what every thread has, in one order; the result is thread 0's.
__device__ inline void add_up(double (&sums)[SUMS]) {
  __shared__ double of_warps[WARPS][SUMS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int s = 0; s < SUMS; ++s) {
    for (int apart = WARP / 2; apart > 0; apart /= 2) sums[s] += __shfl_xor_sync(~0u, sums[s], apart);
    if (lane == 0) of_warps[warp][s] = sums[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < SUMS; ++s) {
    sums[s] = 0;
    for (int w = 0; w < WARPS; ++w) sums[s] += of_warps[w][s];
  }
}

// exp(from - to); 1 for equal infinities, of which nothing has to be scaled.
__device__ inline float scale(float from, float to) { return from == to ? 1.0f : expf(from - to); }

// The correction of a distance when the largest logit of its line changes from `from` to `to`; none where there was no
// largest logit yet.
__device__ inline double moved(float from, float to) {
  return from == to || from == -infinity() ? 0.0 : double(from) - double(to);
}

// A block owns THREADS rows, or columns.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    contrastive_pair_cross_entropy_finish_forward_kernel(const __grid_constant__ PairCrossEntropy p, int tile_columns) {
  const int64_t blocks_of_rows = ceil_div(p.rows, THREADS);
  const bool of_rows = blockIdx.x < blocks_of_rows;
  const int64_t block = blockIdx.x - (of_rows ? 0 : blocks_of_rows);
  const int64_t lines = of_rows ? p.rows : p.columns, classes = of_rows ? p.columns : p.rows;
  const int64_t blocks = of_rows ? blocks_of_rows : ceil_div(p.columns, THREADS);
  const int size = of_rows ? tile_columns : ROWS;
  const int64_t tiles = ceil_div(classes, size);
  const int64_t line = block * THREADS + threadIdx.x;
  const float* partial = (of_rows ? p.row_partial : p.column_partial) + line;

  double sums[SUMS] = {};
  if (line < lines) {
    float largest = -infinity();
    double total = 0, distances = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float tile_largest = partial[tile * lines], part = partial[(tiles + tile) * lines];
      const float now = fmaxf(largest, tile_largest);
      total = total * scale(largest, now) + part * scale(tile_largest, now);
      if (of_rows && p.label_smoothing != 0) {
        const int64_t before = tile * size, left = classes - before;
        distances += double(before) * moved(largest, now);
        distances +=
            double(partial[(2 * tiles + tile) * lines]) + double(left < size ? left : size) * moved(tile_largest, now);
      }
      largest = now;
    }
    const float log = largest == -infinity() ? nan() : logf(float(total));
    float* terms = (of_rows ? p.row_terms : p.column_terms) + line;
    terms[0] = largest;
    terms[lines] = log;

    const int64_t label = p.labels[line];
    const int64_t row = of_rows ? line : label, column = of_rows ? label : line;
    const bool named = 0 <= label && label < classes;
    const float own = named ? widen(static_cast<const T*>(p.logits)[row * p.stride + column]) : nan();
    sums[0] = double(log) + (double(largest) - double(own));
    sums[1] = double(log);
    sums[2] = double(largest);
    sums[3] = distances;
  }
  add_up(sums);
  if (threadIdx.x != 0) return;
  double* to = (of_rows ? p.row_sums : p.column_sums) + block;
#pragma unroll
  for (int s = 0; s < SUMS; ++s) to[s * blocks] = sums[s];
}

__device__ inline double loss_of(const double (&sums)[SUMS], double distances, double classes, double label_smoothing) {
  if (label_smoothing == 0) return sums[0];
  return (1 - label_smoothing) * sums[0] + label_smoothing * (sums[1] - distances / classes);
}

__device__ inline void add_blocks(const double* from, int64_t blocks, double (&sums)[SUMS]) {
  for (int64_t block = threadIdx.x; block < blocks; block += THREADS) {
#pragma unroll
    for (int s = 0; s < SUMS; ++s) sums[s] += from[s * blocks + block];
  }
  add_up(sums);
}

__global__ void __launch_bounds__(THREADS)
    contrastive_pair_cross_entropy_loss_forward_kernel(const __grid_constant__ PairCrossEntropy p) {
  const double rows = double(p.rows), columns = double(p.columns);
  double of_rows[SUMS] = {}, of_columns[SUMS] = {};
  add_blocks(p.row_sums, ceil_div(p.rows, THREADS), of_rows);
  double loss = loss_of(of_rows, of_rows[3], columns, p.label_smoothing);
  if (p.both) {
    __syncthreads();  // the sums of warps may be replaced
    add_blocks(p.column_sums, ceil_div(p.columns, THREADS), of_columns);
    const double distances = of_rows[3] + columns * of_rows[2] - rows * of_columns[2];
    loss = (loss + loss_of(of_columns, distances, rows, p.label_smoothing)) / 2;
  }
  if (threadIdx.x == 0) *p.loss = float(loss);
}

template <typename T, int V, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    contrastive_pair_cross_entropy_backward_kernel(const __grid_constant__ PairCrossEntropy p) {
  const int warp = threadIdx.x / WARP;
  const int64_t column_tiles = ceil_div(p.columns, WARP * V);
  const int64_t first_row = blockIdx.x / column_tiles * ROWS + warp * ROWS_OF_WARP;
  const Columns<T, V, VECTOR> columns(blockIdx.x % column_tiles, p.columns);
  const float even = float(p.label_smoothing / double(p.columns)) * (p.both ? 2.0f : 1.0f);  // both: B = C
  const float weight = p.both ? 0.5f * *p.grad : *p.grad;
  float column_largest[V] = {}, column_log[V] = {};
  if (p.both) {
    columns.read(p.column_terms, 0.0f, column_largest);
    columns.read(p.column_terms + p.columns, 0.0f, column_log);
  }
#pragma unroll 4
  for (int r = 0; r < ROWS_OF_WARP; ++r) {
    const int64_t row = first_row + r;
    if (row >= p.rows) break;
    const float largest = p.row_terms[row], log = p.row_terms[p.rows + row];
    float values[V];
    columns.read(static_cast<const T*>(p.logits) + row * p.stride, 0.0f, values);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float probability = exponential<T>((values[v] - largest) - log);
      if (p.both) probability += exponential<T>((values[v] - column_largest[v]) - column_log[v]);
      values[v] = (probability - even) * weight;
    }
    columns.write(static_cast<T*>(p.grad_logits) + row * p.columns, values);
  }
}

// The gradient where row and column meet, one of which or both have their target there.
template <typename T>
__device__ inline void put_target(const PairCrossEntropy& p, int64_t row, int64_t column, bool of_row, bool of_column) {
  const float value = widen(static_cast<const T*>(p.logits)[row * p.stride + column]);
  const float smoothing = float(p.label_smoothing), even = float(p.label_smoothing / double(p.columns));
  const auto less_target = [&](const float* terms, int64_t lines, bool target) {
    return (expf((value - terms[0]) - terms[lines]) - even) - (target ? 1.0f - smoothing : 0.0f);
  };
  float gradient = less_target(p.row_terms + row, p.rows, of_row);
  if (p.both) gradient += less_target(p.column_terms + column, p.columns, of_column);
  gradient *= p.both ? 0.5f * *p.grad : *p.grad;
  static_cast<T*>(p.grad_logits)[row * p.columns + column] = narrow<T>(gradient);
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    contrastive_pair_cross_entropy_targets_backward_kernel(const __grid_constant__ PairCrossEntropy p) {
  const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (i >= p.rows) return;
  const int64_t label = p.labels[i];
  if (label < 0 || label >= p.columns) return;
  const bool mutual = p.both && p.labels[label] == i;
  put_target<T>(p, i, label, true, mutual);
  if (p.both && !mutual) put_target<T>(p, label, i, false, true);
}

int64_t tile_columns(const PairCrossEntropy& p) { return WARP * vector_of(p.type); }

unsigned tiles(const PairCrossEntropy& p) {
  return unsigned(pair_cross_entropy_row_tiles(p) * pair_cross_entropy_column_tiles(p));
}

}  // namespace

int64_t pair_cross_entropy_row_tiles(const PairCrossEntropy& p) { return ceil_div(p.rows, ROWS); }
int64_t pair_cross_entropy_column_tiles(const PairCrossEntropy& p) { return ceil_div(p.columns, tile_columns(p)); }
int64_t pair_cross_entropy_line_blocks(int64_t lines) { return ceil_div(lines, THREADS); }

void pair_cross_entropy(const PairCrossEntropy& p, cudaStream_t stream) {
  const int64_t row_blocks = pair_cross_entropy_line_blocks(p.rows);
  const int64_t column_blocks = p.both ? pair_cross_entropy_line_blocks(p.columns) : 0;
  dispatch(p.type, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    const auto tiles_kernel = p.vector ? contrastive_pair_cross_entropy_tiles_forward_kernel<T, V, true>
                                       : contrastive_pair_cross_entropy_tiles_forward_kernel<T, V, false>;
    tiles_kernel<<<tiles(p), THREADS, 0, stream>>>(p);
    const auto finish_kernel = contrastive_pair_cross_entropy_finish_forward_kernel<T>;
    finish_kernel<<<unsigned(row_blocks + column_blocks), THREADS, 0, stream>>>(p, int(tile_columns(p)));
  });
  contrastive_pair_cross_entropy_loss_forward_kernel<<<1, THREADS, 0, stream>>>(p);
}

void pair_cross_entropy_backward(const PairCrossEntropy& p, cudaStream_t stream) {
  dispatch(p.type, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    const auto kernel = p.vector ? contrastive_pair_cross_entropy_backward_kernel<T, V, true>
                                 : contrastive_pair_cross_entropy_backward_kernel<T, V, false>;
    kernel<<<tiles(p), THREADS, 0, stream>>>(p);
    const unsigned blocks = unsigned(ceil_div(p.rows, THREADS));
    contrastive_pair_cross_entropy_targets_backward_kernel<T><<<blocks, THREADS, 0, stream>>>(p);
  });
}

}  // namespace mlip::cuda::contrastive
