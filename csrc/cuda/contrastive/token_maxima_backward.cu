// Gradient of the tokens of one side from the means of the best similarities (token_maxima.cu): a token gets its
// argmax, and the tokens whose argmax it is:
//
//   dv_bn = sum_c  grad_mean[b, c] w_bn other_c[argmax_other_bcn]
//                + grad_other_mean[c, b] sum_{m : argmax_bcm = n} other_w_cm other_cm
//
// without terms in which either token is masked: an argmax that is masked means that there was none. For the images the
// other side are the texts; for the texts the two change places, and the indices are read with their strides.
//
//   others [C, M, D], dv [B, N, D] float32, float16 or bfloat16      indices of 1, 2 or 4 bytes      the rest float32
//
//   reads     B C (N + M) D of the others, from the L2 cache; the indices, masks and weights
//   writes    B N D dv
//   flops     2 B C (N + M) D
//
// Bound by the L2 cache: one vector read for each multiplied and added. It is sparse: coefficients never exist as
// B C x N M. A block owns 32 tokens of one row of the batch and 128 channels, and goes through the other side in order,
// eight parts of 128 tokens at a time: each warp lists the terms of one part in shared memory, then every warp adds
// those of the tokens that it owns (warp w every eighth, lane l four channels), reading four at once. Nobody else
// touches its sums, which lie in shared memory: no atomics, one order of adding. The sums of 16 parts are added up
// apart, so that many round no worse than few.
#include "cuda/contrastive/contrastive.h"

namespace mlip::cuda::contrastive {
namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARP * WARPS;
constexpr int VECTOR = 4;             // channels of a lane
constexpr int SLICE = WARP * VECTOR;  // channels of a block
constexpr int ROWS = 32;              // tokens of a block
constexpr int ROWS_OF_WARP = ROWS / WARPS;
constexpr int AT_ONCE = 4;  // tokens that a warp reads at a time
constexpr int PART = 128;   // tokens of the other side
constexpr int RUN = 2;      // times that eight parts are summed before they are added to the rest

// A token of the other side times a number is added to a row of the block.
struct Term {
  int row_and_token;  // row + ROWS * token
  float factor;
};

__device__ inline int index_at(const Argmax& argmax, int64_t at) {
  switch (argmax.bytes) {
    case 1:
      return static_cast<const uint8_t*>(argmax.values)[at];
    case 2:
      return static_cast<const uint16_t*>(argmax.values)[at];
    default:
      return static_cast<const int32_t*>(argmax.values)[at];
  }
}

// A lane's channels lie together where they move in one access, else 32 apart. `left` channels exist from its first on.
template <typename T>
__device__ inline void read(const T* from, int64_t left, bool vector, float (&to)[VECTOR]) {
  if (vector) {
    if (left > 0) load<VECTOR>(from, to);
  } else {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      if (v * WARP < left) to[v] = widen(from[v * WARP]);
    }
  }
}

template <typename T>
__device__ inline void write(T* to, int64_t left, bool vector, const float (&from)[VECTOR]) {
  if (vector) {
    if (left <= 0) return;
    // One access each; of a Pack, the compiler makes several here.
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(from[0]),
                   "f"(from[1]), "f"(from[2]), "f"(from[3])
                   : "memory");
    } else {
      uint16_t bits[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        const T value = narrow<T>(from[v]);
        bits[v] = reinterpret_cast<const uint16_t&>(value);
      }
      asm volatile("st.global.v4.u16 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "h"(bits[0]),
                   "h"(bits[1]), "h"(bits[2]), "h"(bits[3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      if (v * WARP < left) to[v * WARP] = narrow<T>(from[v]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 3)
    contrastive_token_maxima_backward_kernel(const __grid_constant__ TokenMaximaBackward p) {
  __shared__ float4 run[ROWS][WARP], sums[ROWS][WARP];
  __shared__ Term terms[WARPS][ROWS + PART];
  __shared__ int lengths[WARPS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int slices = int(ceil_div(p.channels, SLICE)), row_blocks = int(ceil_div(p.count, ROWS));
  const int64_t channel = int64_t(blockIdx.x % slices) * SLICE + lane * (p.vector ? VECTOR : 1);
  const int first_row = int(blockIdx.x / slices % row_blocks) * ROWS;
  const int64_t b = blockIdx.x / slices / row_blocks;
  const int64_t left = p.channels - channel;
  const T* others = static_cast<const T*>(p.others) + channel;

  const int own_row = first_row + lane;
  const float weight = own_row < p.count ? p.weight[b * p.count + own_row] : 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS_OF_WARP; ++r) {
    run[r * WARPS + warp][lane] = sums[r * WARPS + warp][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  const auto flush = [&] {
#pragma unroll
    for (int r = 0; r < ROWS_OF_WARP; ++r) {
      float4& sum = sums[r * WARPS + warp][lane];
      float4& part = run[r * WARPS + warp][lane];
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
      part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  };

  const int parts_of_other = int(ceil_div(p.other_count, PART));
  const int64_t parts = p.other_batch * parts_of_other;
  // Lists the terms of a part: tokens whose argmax is a row of the block, and before the first part the argmax of each
  // row.
  const auto list = [&](int64_t part, Term* to) {
    const int64_t c = part / parts_of_other;
    const int start = int(part % parts_of_other) * PART;
    const Flag* other_mask = p.other_mask ? p.other_mask + c * p.other_count : nullptr;
    int length = 0;
    const auto append = [&](bool term, int row, int token, float factor) {
      const unsigned all = __ballot_sync(~0u, term);
      if (term) to[length + __popc(all & ((1u << lane) - 1))] = {row + ROWS * token, factor};
      length += __popc(all);
    };
    if (start == 0) {
      int argmax = p.other_count;
      if (own_row < p.count) {
        argmax = index_at(p.argmax_other, b * p.argmax_other.stride_b + c * p.argmax_other.stride_c + own_row);
      }
      const bool valid = unsigned(argmax) < unsigned(p.other_count) && (other_mask == nullptr || other_mask[argmax]);
      append(valid, lane, argmax, p.grad_mean[b * p.other_batch + c] * weight);
    }
    const float grad = p.grad_other_mean[c * p.batch + b];
    const int64_t first_argmax = b * p.argmax.stride_b + c * p.argmax.stride_c;
#pragma unroll
    for (int i = 0; i < PART / WARP; ++i) {
      const int token = start + i * WARP + lane;
      const bool valid = token < p.other_count && (other_mask == nullptr || other_mask[token]);
      const int row = valid ? index_at(p.argmax, first_argmax + token) - first_row : -1;
      const bool in_block = 0 <= row && row < ROWS;
      append(in_block, row, token, in_block ? grad * p.other_weight[c * p.other_count + token] : 0.0f);
    }
    return length;
  };
  // Adds the terms that the lanes in `chosen` have, in order.
  const auto add = [&](const T* tokens, unsigned chosen, const Term& term) {
    while (chosen != 0) {
      int rows[AT_ONCE];
      float factors[AT_ONCE], values[AT_ONCE][VECTOR] = {};
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int from = chosen != 0 ? __ffs(int(chosen)) - 1 : 0;
        const int row_and_token = __shfl_sync(~0u, term.row_and_token, from);
        factors[i] = __shfl_sync(~0u, term.factor, from);
        rows[i] = chosen != 0 ? row_and_token % ROWS : -1;
        if (rows[i] >= 0) read(tokens + row_and_token / ROWS * p.stride_token, left, p.vector, values[i]);
        chosen &= chosen - 1;
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (rows[i] < 0) break;
        float4& sum = run[rows[i]][lane];
        sum = make_float4(sum.x + factors[i] * values[i][0], sum.y + factors[i] * values[i][1],
                          sum.z + factors[i] * values[i][2], sum.w + factors[i] * values[i][3]);
      }
    }
  };

  for (int64_t first = 0; first < parts; first += WARPS) {
    const int length = first + warp < parts ? list(first + warp, terms[warp]) : 0;
    if (lane == 0) lengths[warp] = length;
    __syncthreads();  // the terms are listed
    for (int w = 0; w < WARPS && first + w < parts; ++w) {
      const T* tokens = others + (first + w) / parts_of_other * p.stride_batch;
      for (int start = 0; start < lengths[w]; start += WARP) {
        const bool in_bounds = start + lane < lengths[w];
        const Term term = in_bounds ? terms[w][start + lane] : Term{0, 0.0f};
        add(tokens, __ballot_sync(~0u, in_bounds && term.row_and_token % WARPS == warp), term);
      }
    }
    if (first / WARPS % RUN == RUN - 1) flush();
    __syncthreads();  // the lists may be replaced
  }
  flush();

  for (int r = 0; r < ROWS_OF_WARP; ++r) {
    const int row = first_row + r * WARPS + warp;
    if (row >= p.count) break;
    const bool real = p.mask == nullptr || p.mask[b * p.count + row];
    const float4 sum = real ? sums[row - first_row][lane] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float values[VECTOR] = {sum.x, sum.y, sum.z, sum.w};
    write(static_cast<T*>(p.grad) + (b * p.count + row) * p.channels + channel, left, p.vector, values);
  }
}

}  // namespace

int64_t token_maxima_backward_blocks(const TokenMaximaBackward& p) {
  return p.batch * ceil_div(p.count, ROWS) * ceil_div(p.channels, SLICE);
}

void token_maxima_backward(const TokenMaximaBackward& p, cudaStream_t stream) {
  dispatch(p.type, [&](auto element) {
    const unsigned blocks = unsigned(token_maxima_backward_blocks(p));
    contrastive_token_maxima_backward_kernel<decltype(element)><<<blocks, THREADS, 0, stream>>>(p);
  });
}

}  // namespace mlip::cuda::contrastive
