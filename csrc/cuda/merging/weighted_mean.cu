// Size-weighted mean over tokens: y_b = sum_n w_bn x_bn / W_b with W_b = sum_n w_bn, over the tokens behind the prefix.
//
//   x [B, N, D] float32, float16 or bfloat16, unit stride in D     w [B, N] float32     y [B, D] as x
//   dx_bn = w_bn / W_b g_b                      dw_bn = (<g_b, x_bn> - sum_m w_bm <g_b, x_bm> / W_b) / W_b
//
//   kernel              reads                     writes           flops
//   sums (+ finish)     B N D x, B N w            B D y            2 B N D
//   backward            B D g, B N w              B N D dx         B N D
//   products, centre    B N D x, B D g, B N w     B N dw           2 B N D
//
// Bound by memory throughout: 2 flops per element at most. Sums are kept in float32.
//
// sums: a block owns 32 vectors of channels of one batch element; its 8 warps take every eighth token, four at a time,
// so a warp has 4 x 512 contiguous bytes in flight, and the 8 running sums meet in shared memory, in a fixed order.
// Where B D alone gives too few blocks, the tokens are cut into splits whose partial sums `finish` adds in order: no
// atomics, and the result is bitwise the same from run to run.
//
// backward, products: a warp owns a token.
// centre: a block owns a batch element.
#include "cuda/merging/merging.h"

namespace mlip::cuda::merging {
namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARP * WARPS;
constexpr int ROWS = 4;                    // tokens that a warp has in flight at once
constexpr int64_t BLOCKS_WANTED = 512;     // a few for each multiprocessor of a large GPU
constexpr int64_t TOKENS_PER_SPLIT = 256;  // at least, so that a split is worth its partial sums

__device__ inline float weight_of(const WeightedMean& p, int64_t b, int64_t n) {
  return p.weight ? p.weight[b * p.tokens + n] : 1.0f;
}

__device__ inline float ratio(float a, float total) { return total == 0.0f ? 0.0f : a / total; }

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) weighted_mean_sums_forward_kernel(const WeightedMean p) {
  const int64_t column_blocks = ceil_div(p.channels, WARP * V);
  const int64_t b = blockIdx.x / column_blocks;
  const int64_t first_channel = blockIdx.x % column_blocks * (WARP * V);
  const int64_t channel = first_channel + threadIdx.x * V;
  const int64_t length = ceil_div(p.tokens - p.prefix, p.splits);
  const int64_t first = p.prefix + blockIdx.y * length;
  const int64_t last = first + length < p.tokens ? first + length : p.tokens;
  const T* x = static_cast<const T*>(p.x) + b * p.stride_batch + channel;

  float sums[V] = {};
  float weights = 0.0f;
  for (int64_t n = first + threadIdx.y; n < last; n += ROWS * WARPS) {
    float weight[ROWS], values[ROWS][V] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      weight[r] = n + r * WARPS < last ? weight_of(p, b, n + r * WARPS) : 0.0f;
      // A token of weight 0 is left out whatever it holds, NaN included.
      if (weight[r] != 0.0f && channel < p.channels) load<V>(x + (n + r * WARPS) * p.stride_token, values[r]);
    }
    weights += (weight[0] + weight[1]) + (weight[2] + weight[3]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[v] +=
          (weight[0] * values[0][v] + weight[1] * values[1][v]) + (weight[2] * values[2][v] + weight[3] * values[3][v]);
    }
  }

  __shared__ float shared_sums[WARPS][WARP * V];
  __shared__ float shared_weights[WARPS];
#pragma unroll
  for (int v = 0; v < V; ++v) shared_sums[threadIdx.y][threadIdx.x * V + v] = sums[v];
  if (threadIdx.x == 0) shared_weights[threadIdx.y] = weights;
  __syncthreads();

  float total = 0.0f;
  for (int warp = 0; warp < WARPS; ++warp) total += shared_weights[warp];
  const int thread = threadIdx.y * WARP + threadIdx.x;
  for (int c = thread; c < WARP * V; c += THREADS) {
    if (first_channel + c >= p.channels) break;
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) sum += shared_sums[warp][c];
    if (p.splits == 1) {
      static_cast<T*>(p.mean)[b * p.channels + first_channel + c] = narrow<T>(ratio(sum, total));
    } else {
      p.partial[(blockIdx.y * p.batch + b) * p.channels + first_channel + c] = sum;
    }
  }
  if (first_channel == 0 && thread == 0) {
    (p.splits == 1 ? p.total : p.partial_total + blockIdx.y * p.batch)[b] = total;
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) weighted_mean_finish_forward_kernel(const WeightedMean p) {
  const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (i >= p.batch * p.channels) return;
  const int64_t b = i / p.channels;
  float sum = 0.0f, total = 0.0f;
  for (int64_t split = 0; split < p.splits; ++split) {
    sum += p.partial[split * p.batch * p.channels + i];
    total += p.partial_total[split * p.batch + b];
  }
  static_cast<T*>(p.mean)[i] = narrow<T>(ratio(sum, total));
  if (i % p.channels == 0) p.total[b] = total;
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) weighted_mean_backward_kernel(const WeightedMean p) {
  for (int64_t row = blockIdx.x * int64_t(WARPS) + threadIdx.y; row < p.batch * p.tokens;
       row += int64_t(gridDim.x) * WARPS) {
    const int64_t b = row / p.tokens, n = row % p.tokens;
    const T* grad = static_cast<const T*>(p.grad) + b * p.channels;
    T* grad_x = static_cast<T*>(p.grad_x) + row * p.channels;
    const float normalized_weight = ratio(weight_of(p, b, n), p.known_total[b]);
    for (int64_t d = threadIdx.x * V; d < p.channels; d += WARP * V) {
      float values[V];
      load<V>(grad + d, values);
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = n < p.prefix ? 0.0f : normalized_weight * values[v];
      store<V>(grad_x + d, values);
    }
  }
}

// grad_weight = <g_b, x_bn>; where the weight is 0, what is not finite in x counts as 0.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) weighted_mean_products_backward_kernel(const WeightedMean p) {
  for (int64_t row = blockIdx.x * int64_t(WARPS) + threadIdx.y; row < p.batch * p.tokens;
       row += int64_t(gridDim.x) * WARPS) {
    const int64_t b = row / p.tokens, n = row % p.tokens;
    if (n < p.prefix) continue;
    const T* grad = static_cast<const T*>(p.grad) + b * p.channels;
    const T* x = static_cast<const T*>(p.x) + b * p.stride_batch + n * p.stride_token;
    const bool unused = weight_of(p, b, n) == 0.0f;
    float sum = 0.0f;
    for (int64_t d = threadIdx.x * V; d < p.channels; d += WARP * V) {
      float g[V], values[V];
      load<V>(grad + d, g);
      load<V>(x + d, values);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += g[v] * (unused && !isfinite(values[v]) ? 0.0f : values[v]);
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x == 0) p.grad_weight[row] = sum;
  }
}

__global__ void __launch_bounds__(THREADS) weighted_mean_centre_backward_kernel(const WeightedMean p) {
  const int64_t b = blockIdx.x;
  const float total = p.known_total[b];
  float* product = p.grad_weight + b * p.tokens;

  float sum = 0.0f;
  for (int64_t n = p.prefix + threadIdx.x; n < p.tokens; n += THREADS) {
    sum += ratio(weight_of(p, b, n), total) * product[n];
  }
  for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  __shared__ float shared[WARPS];
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = sum;
  __syncthreads();
  float along_mean = 0.0f;  // <g, y> = sum of w / W <g, x>
  for (int warp = 0; warp < WARPS; ++warp) along_mean += shared[warp];

  for (int64_t n = threadIdx.x; n < p.tokens; n += THREADS) {
    product[n] = n < p.prefix ? 0.0f : ratio(product[n] - along_mean, total);
  }
}

int64_t column_blocks(Type type, int64_t channels, bool vector) {
  return ceil_div(channels, WARP * (vector ? vector_of(type) : 1));
}

// Blocks of the kernels in which a warp goes from token to token.
unsigned row_blocks(const WeightedMean& p) {
  const int64_t blocks = ceil_div(p.batch * p.tokens, WARPS);
  return unsigned(blocks < LARGEST_GRID ? blocks : LARGEST_GRID);
}

}  // namespace

int64_t weighted_mean_splits(Type type, int64_t batch, int64_t tokens, int64_t channels) {
  const int64_t blocks = batch * column_blocks(type, channels, true);
  const int64_t wanted = blocks == 0 ? 1 : ceil_div(BLOCKS_WANTED, blocks);
  const int64_t most = tokens / TOKENS_PER_SPLIT;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}

void weighted_mean_forward(const WeightedMean& p, cudaStream_t stream) {
  dispatch(p.type, p.vector, [&](auto element, auto vector) {
    using T = decltype(element);
    const dim3 grid(unsigned(p.batch * column_blocks(p.type, p.channels, p.vector)), unsigned(p.splits));
    weighted_mean_sums_forward_kernel<T, decltype(vector)::value><<<grid, dim3(WARP, WARPS), 0, stream>>>(p);
    if (p.splits == 1) return;
    const unsigned blocks = unsigned(ceil_div(p.batch * p.channels, THREADS));
    weighted_mean_finish_forward_kernel<T><<<blocks, THREADS, 0, stream>>>(p);
  });
}

void weighted_mean_backward(const WeightedMean& p, cudaStream_t stream) {
  dispatch(p.type, p.vector, [&](auto element, auto vector) {
    const auto kernel = weighted_mean_backward_kernel<decltype(element), decltype(vector)::value>;
    kernel<<<row_blocks(p), dim3(WARP, WARPS), 0, stream>>>(p);
  });
}

void weighted_mean_backward_weight(const WeightedMean& p, cudaStream_t stream) {
  dispatch(p.type, p.vector, [&](auto element, auto vector) {
    const auto kernel = weighted_mean_products_backward_kernel<decltype(element), decltype(vector)::value>;
    kernel<<<row_blocks(p), dim3(WARP, WARPS), 0, stream>>>(p);
  });
  weighted_mean_centre_backward_kernel<<<unsigned(p.batch), THREADS, 0, stream>>>(p);
}

}  // namespace mlip::cuda::merging
