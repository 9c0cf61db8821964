// Merging rows of tokens, x [B, N, C] to [B, N', C] with N' = N - r, and the transposed copy back.
//
//   merge     y_o = sum_n w_n x_n over the rows n of output row o, where w_n = size_n / size_o
//   combine   the same with given weights, or with none
//   spread    x_n = w_n y_a(n), with a(n) the output row of input row n, or with no weights y_a(n)
//
//   x, y float32, float16 or bfloat16, unit stride in C     weights and sizes float32
//
// Each reads its input once and writes its output once: B (N + N') C elements, bound by memory; the maps and weights
// are some 30 B N bytes. Spread reads what is merged once more for every row that was merged into it.
//
// merge, combine: a block owns ROWS output rows of a sample. It looks through the r removed rows of the sample and
// lists those that belong to its own, in order, so nothing is added by atomics; a list that is too long for shared
// memory is looked for in the maps again for every row. A warp owns an output row: lanes compare 32 entries of the list
// at a time. The terms of a sum are added in ascending order behind the row that it starts from, product and addition
// rounded separately as in plain PyTorch. A row that nothing is merged into is a copy of bits.
//
// spread: a warp owns SPREAD_ROWS consecutive input rows.
#include "cuda/merging/merge.h"

#include <cuda_runtime_api.h>

#include <type_traits>

#include "cuda/elements.cuh"

namespace mlip::cuda {
namespace {

constexpr int WARP = 32;
constexpr int WARPS = 8;
constexpr int THREADS = WARP * WARPS;
constexpr int ROWS = 32;          // output rows of a block
constexpr int MOST_TERMS = 1024;  // of all these rows together that a block lists
constexpr int SPREAD_ROWS = 4;
constexpr int FLIGHT = 4;  // accesses that a lane has in flight, and
constexpr int SUMS = 8;    // at most as many elements of a sum

// The removed rows that belong to the output rows of a block.
struct Terms {
  int row[MOST_TERMS];
  uint8_t output[MOST_TERMS];  // counted from the block's first
  int found[WARPS];
};

// Where a sample has its rows and what is known of them.
template <typename T>
struct SampleRows {
  const T* from;
  const int64_t *assignment, *kept, *removed;
  const bool* dropped;
  const float* size;
  int merged;
  int64_t stride_token;

  __device__ SampleRows(const MergeRows& p, int64_t b)
      : from(static_cast<const T*>(p.from) + b * p.stride_batch),
        assignment(p.assignment + b * p.tokens),
        kept(p.kept + b * p.outputs),
        removed(p.removed + b * (p.tokens - p.outputs)),
        dropped(p.dropped ? p.dropped + b * p.tokens : nullptr),
        size(p.size ? p.size + b * p.tokens : nullptr),
        merged(p.tokens - p.outputs),
        stride_token(p.stride_token) {}

  __device__ bool lost(int n) const { return dropped && dropped[n]; }
  __device__ float size_of(int n) const { return size ? size[n] : 1.0f; }
  __device__ const T* row(int n) const { return from + n * stride_token; }
};

// Lists the removed rows that are merged into output rows first to first + count, in their order, and returns how many
// they are, whether they fit or not. What was dropped goes to no row: for `lost` it is enough to see it.
template <typename T, typename Lost>
__device__ inline int list_terms(const SampleRows<T>& sample, int first, int count, Terms& terms, Lost lost) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int total = 0;
  for (int from = 0; from < sample.merged; from += THREADS) {
    const int k = from + threadIdx.x;
    const int n = k < sample.merged ? int(sample.removed[k]) : 0;
    const int output = k < sample.merged ? int(sample.assignment[n]) - first : -1;
    bool own = 0 <= output && output < count;
    if (own && sample.lost(n)) {
      lost(n);
      own = false;
    }
    const unsigned all = __ballot_sync(~0u, own);
    if (lane == 0) terms.found[warp] = __popc(all);
    __syncthreads();  // numbers of all warps are there
    int place = total + __popc(all & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) place += terms.found[w];
      total += terms.found[w];
    }
    if (own && place < MOST_TERMS) {
      terms.row[place] = n;
      terms.output[place] = uint8_t(output);
    }
    __syncthreads();  // the numbers may be replaced, and the list may be read
  }
  return total;
}

// Calls visit(n) for every removed row n that is merged into output row first + output, in order, by a whole warp.
template <typename T, typename Visit>
__device__ inline void for_each_term(const SampleRows<T>& sample, const Terms& terms, int total, int first, int output,
                                     Visit visit) {
  const int lane = threadIdx.x % WARP;
  const bool listed = total <= MOST_TERMS;
  const int count = listed ? total : sample.merged;
#pragma unroll 1
  for (int from = 0; from < count; from += WARP) {
    const int k = from + lane;
    int n = -1;
    if (listed) {
      if (k < count && terms.output[k] == output) n = terms.row[k];
    } else if (k < count) {
      const int row = int(sample.removed[k]);
      if (sample.assignment[row] == first + output && !sample.lost(row)) n = row;
    }
    for (unsigned rest = __ballot_sync(~0u, n >= 0); rest; rest &= rest - 1) {
      visit(__shfl_sync(~0u, n, __ffs(rest) - 1));
    }
  }
}

// to = from, bit by bit, by a warp.
template <int V, typename T>
__device__ inline void copy_row(const T* from, int64_t channels, T* to) {
  using Vector = Pack<T, V>;
#pragma unroll 1
  for (int64_t c = threadIdx.x % WARP * V; c < channels; c += FLIGHT * WARP * V) {
    Vector values[FLIGHT];
#pragma unroll
    for (int f = 0; f < FLIGHT; ++f) {
      const int64_t at = c + f * WARP * V;
      if (at < channels) values[f] = *reinterpret_cast<const Vector*>(from + at);
    }
#pragma unroll
    for (int f = 0; f < FLIGHT; ++f) {
      const int64_t at = c + f * WARP * V;
      if (at < channels) *reinterpret_cast<Vector*>(to + at) = values[f];
    }
  }
}

template <typename T, int V, bool MERGE>
__device__ inline void combine_block(const MergeRows& p) {
  __shared__ Terms terms;
  const int blocks = int(ceil_div(p.outputs, ROWS));
  const int64_t b = blockIdx.x / blocks;
  const int first = int(blockIdx.x % blocks) * ROWS;
  const int count = p.outputs - first < ROWS ? p.outputs - first : ROWS;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const SampleRows<T> sample(p, b);
  const int total = list_terms(sample, first, count, terms, [&](int n) {
    if constexpr (MERGE) p.weight[b * p.tokens + n] = 0.0f;
  });

  for (int o = warp; o < count; o += WARPS) {
    const int64_t output = b * p.outputs + first + o;
    const int start = int(sample.kept[first + o]);
    T* to = static_cast<T*>(p.to) + output * p.channels;
    const auto for_each = [&](auto visit) { for_each_term(sample, terms, total, first, o, visit); };

    const float* weights = MERGE ? p.weight : p.known_weight;
    if (weights) weights += b * p.tokens;
    float start_weight = !MERGE && weights ? weights[start] : 1.0f;
    bool alone = true;
    if constexpr (MERGE) {
      const float counted = p.mask && !p.mask[output] ? 0.0f : sample.size_of(start);
      float sum = counted;
      for_each([&](int n) {
        sum += sample.size_of(n);
        alone = false;
      });
      const float divisor = sum > 0 ? sum : 1.0f;
      start_weight = sum > 0 ? counted / sum : 1.0f;
      if (lane == 0) {
        p.merged_size[output] = sum;
        p.weight[b * p.tokens + start] = start_weight;
      }
      for_each([&](int n) {
        if (lane == 0) p.weight[b * p.tokens + n] = sample.size_of(n) / divisor;
      });
      __syncwarp();  // all lanes see the weights
    } else {
      for_each([&](int) { alone = false; });
    }
    if (alone && start_weight == 1.0f) {
      copy_row<V>(sample.row(start), p.channels, to);
      continue;
    }
    constexpr int MANY = SUMS / V < FLIGHT ? SUMS / V : FLIGHT;
#pragma unroll 1
    for (int64_t start_channel = 0; start_channel < p.channels; start_channel += MANY * WARP * V) {
      const int64_t c = start_channel + lane * V;
      float sums[MANY][V];
      const auto take = [&](const T* row, float weight, bool add) {
        Pack<T, V> values[MANY] = {};
#pragma unroll
        for (int f = 0; f < MANY; ++f) {
          if (c + f * WARP * V < p.channels) {
            values[f] = *reinterpret_cast<const Pack<T, V>*>(row + c + f * WARP * V);
          }
        }
#pragma unroll
        for (int f = 0; f < MANY; ++f) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float term = __fmul_rn(widen(values[f].element[v]), weight);  // not to be fused with the addition
            sums[f][v] = add ? __fadd_rn(sums[f][v], term) : term;
          }
        }
      };
      take(sample.row(start), start_weight, false);
      for_each([&](int n) { take(sample.row(n), weights ? weights[n] : 1.0f, true); });
#pragma unroll
      for (int f = 0; f < MANY; ++f) {
        if (c + f * WARP * V < p.channels) store<V>(to + c + f * WARP * V, sums[f]);
      }
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 3) merging_merge_kernel(const __grid_constant__ MergeRows p) {
  combine_block<T, V, true>(p);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 3) merging_combine_kernel(const __grid_constant__ MergeRows p) {
  combine_block<T, V, false>(p);
}

// V elements as they lie in memory, in a type that is moved by one instruction.
template <typename T, int V>
using BitsOf = std::conditional_t<sizeof(T) * V == 16, uint4, T>;

template <typename T, int V>
__device__ inline BitsOf<T, V> scaled(BitsOf<T, V> bits, float weight) {
  static_assert(sizeof(bits) == sizeof(Pack<T, V>));
  Pack<T, V> pack;
  memcpy(&pack, &bits, sizeof bits);
#pragma unroll
  for (int v = 0; v < V; ++v) pack.element[v] = narrow<T>(widen(pack.element[v]) * weight);
  memcpy(&bits, &pack, sizeof bits);
  return bits;
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) merging_spread_kernel(const __grid_constant__ MergeRows p) {
  using Bits = BitsOf<T, V>;
  const int lane = threadIdx.x % WARP;
  const int64_t rows = p.batch * p.tokens;
  const int64_t first = (blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP) * SPREAD_ROWS;
  if (first >= rows) return;
  const int count = rows - first < SPREAD_ROWS ? int(rows - first) : SPREAD_ROWS;
  int64_t offset = 0;
  float weight = 1.0f;
  bool lost = false;
  if (lane < count) {
    const int64_t row = first + lane;
    offset = row / p.tokens * p.stride_batch + p.assignment[row] * p.stride_token;
    if (p.known_weight) weight = p.known_weight[row];
    lost = p.dropped && p.dropped[row];
  }
  const T* from[SPREAD_ROWS];
  float weights[SPREAD_ROWS];
  bool there[SPREAD_ROWS];
#pragma unroll
  for (int i = 0; i < SPREAD_ROWS; ++i) {
    from[i] = static_cast<const T*>(p.from) + __shfl_sync(~0u, offset, i);
    weights[i] = __shfl_sync(~0u, weight, i);
    there[i] = !__shfl_sync(~0u, int(lost), i);
  }
  T* to = static_cast<T*>(p.to) + first * p.channels;
  for (int64_t c = lane * V; c < p.channels; c += WARP * V) {
    Bits values[SPREAD_ROWS];  // of rows behind the last one, the first row: so no access depends on anything
#pragma unroll
    for (int i = 0; i < SPREAD_ROWS; ++i) values[i] = *reinterpret_cast<const Bits*>(from[i] + c);
#pragma unroll
    for (int i = 0; i < SPREAD_ROWS; ++i) {
      if (i >= count) break;
      if (!there[i]) {
        values[i] = Bits{};
      } else if (weights[i] != 1.0f) {
        values[i] = scaled<T, V>(values[i], weights[i]);
      }
      T* at = to + i * p.channels + c;
      if constexpr (sizeof(Bits) == 16) {
        __stcg(reinterpret_cast<Bits*>(at), values[i]);  // the compiler cuts a plain store into four
      } else {
        *at = values[i];
      }
    }
  }
}

template <typename T, int V>
void launch_merge(const MergeRows& p, cudaStream_t stream) {
  merging_merge_kernel<T, V><<<unsigned(combine_blocks(p)), THREADS, 0, stream>>>(p);
}

template <typename T, int V>
void launch_combine(const MergeRows& p, cudaStream_t stream) {
  merging_combine_kernel<T, V><<<unsigned(combine_blocks(p)), THREADS, 0, stream>>>(p);
}

template <typename T, int V>
void launch_spread(const MergeRows& p, cudaStream_t stream) {
  merging_spread_kernel<T, V><<<unsigned(spread_blocks(p)), THREADS, 0, stream>>>(p);
}

}  // namespace

int64_t combine_blocks(const MergeRows& p) { return p.batch * ceil_div(p.outputs, ROWS); }
int64_t spread_blocks(const MergeRows& p) { return ceil_div(p.batch * p.tokens, WARPS * SPREAD_ROWS); }

// One launcher per kernel, over the element type and whether rows are read 16 bytes at a time.
#define MLIP_LAUNCH(function)                                                                              \
  switch (problem.type) {                                                                                  \
    case Type::float32:                                                                                    \
      return problem.vector ? function<float, 4>(problem, stream) : function<float, 1>(problem, stream);   \
    case Type::float16:                                                                                    \
      return problem.vector ? function<__half, 8>(problem, stream) : function<__half, 1>(problem, stream); \
    case Type::bfloat16:                                                                                   \
      return problem.vector ? function<__nv_bfloat16, 8>(problem, stream)                                  \
                            : function<__nv_bfloat16, 1>(problem, stream);                                 \
  }

void merge_rows(const MergeRows& problem, cudaStream_t stream) { MLIP_LAUNCH(launch_merge) }
void combine_rows(const MergeRows& problem, cudaStream_t stream) { MLIP_LAUNCH(launch_combine) }
void spread_rows(const MergeRows& problem, cudaStream_t stream) { MLIP_LAUNCH(launch_spread) }

}  // namespace mlip::cuda
