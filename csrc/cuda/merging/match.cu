// Bipartite matching of tokens: every token at an even position proposes to merge into the token at an odd position
// with the highest cosine, and the r best proposals are carried out. S sources, T targets, S, T ~ N / 2, vectors of D.
//
//   metric [B, N, D] float32, float16 or bfloat16, unit stride in D     guide [B, N] of any of these or float64
//
//   kernel          reads                       writes                 flops
//   match           B N D metric                some 30 B N of maps    2 B S T D    N <= 1024
//   similarities    B N D metric                12 B S                 2 B S T D    else
//   maps            12 B S and a mask           some 30 B N of maps    -
//
// Bound by the tensor cores from D ~ 100 on, below by memory. Tiles are of 128 sources and 128 targets, or of 64 where
// that is enough; beyond one tile the metric is read again for every tile of the other side, from the L2 cache. Their
// similarities stay in registers: of a source, the best target and its cosine remain (similarities.cuh), in shared
// memory up to N = 1024, where one block does all that a sample needs.
//
// The pairs are those of the definition to the last tie: cosines that may decide are summed in float64. Where all
// tokens are alike, all of them are.
#include "cuda/merging/merging.h"

#include "cuda/merging/similarities.cuh"

namespace mlip::cuda::merging {
namespace {

// --- the r best proposals and the order of the output ----------------------------------------------------------------

// Scores are whole numbers of the same order here. The r-th highest is found bit by bit, each by counting how many
// sources reach it, so nothing is sorted and a sample may have any number of tokens; of sources that tie there, the
// lowest are taken. A token's row is then the number of tokens that come before it: by what becomes of them, then by
// position. The warps of the block own consecutive parts of the tokens and look at them twice, to count and to write.

// What becomes of a token, in the order of the output: a removed one starts no output row.
enum Fate { PREFIX, SOURCE, TARGET, PADDING, MERGED, FATES };

struct Counts {
  int of[FATES][WARPS];
};

__device__ inline double guide_of(const Match& p, int64_t b, int n) {
  const int64_t at = b * p.guide_stride_batch + n * p.guide_stride_token;
  switch (p.guide_type) {
    case GuideType::float32:
      return static_cast<const float*>(p.guide)[at];
    case GuideType::float16:
      return widen(static_cast<const __half*>(p.guide)[at]);
    case GuideType::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(p.guide)[at]);
    default:
      return static_cast<const double*>(p.guide)[at];
  }
}

// The score of a source as a number of the same order, > 0; or 0 without a target. Of 32 bits where there is no guide.
__device__ inline uint64_t key_of(const Match& p, int64_t b, int n, float similarity) {
  if (similarity == -INFINITY) return 0;
  if (p.guide == nullptr) {
    const uint32_t bits = __float_as_uint(similarity + 0.0f);  // of both zeros the positive one
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  constexpr double LARGEST = 0x1.fffffffffffffp1023;
  double penalty = __dmul_rn(guide_of(p, b, n), p.guide_weight);
  penalty = isnan(penalty) ? LARGEST : fmin(fmax(penalty, -LARGEST), LARGEST);
  const double score = __dsub_rn(double(similarity), penalty) + 0.0;
  const uint64_t bits = uint64_t(__double_as_longlong(score));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// Which sources merge: those with a key above `least`, and of those that have this key the ones up to `last`.
struct Chosen {
  uint64_t least;
  int last;

  __device__ bool operator()(uint64_t key, int source) const {
    return key > least || (key == least && key != 0 && source <= last);
  }
};

// How many of 0 <= i < count satisfy `condition`, known to all threads of the block.
template <typename Condition>
__device__ inline int count_block(int count, Condition condition) {
  int total = 0;
#pragma unroll 1
  for (int from = 0; from < count; from += THREADS) {
    const int i = from + int(threadIdx.x);
    total += __syncthreads_count(i < count && condition(i));
  }
  return total;
}

// The r best of the sources, or all that have a target.
__device__ inline Chosen choose_sources(const Match& p, const uint64_t* key) {
  const int sources = p.sources();
  uint64_t least = 0;
  for (uint64_t bit = p.guide ? uint64_t(1) << 63 : uint64_t(1) << 31; bit > 0; bit /= 2) {
    const uint64_t higher = least | bit;
    if (count_block(sources, [&](int s) { return key[s] >= higher; }) >= p.r) least = higher;
  }
  const int ties = p.r - count_block(sources, [&](int s) { return key[s] > least; });
  if (count_block(sources, [&](int s) { return key[s] == least; }) <= ties) return {least, sources};
  int last = 0;
  for (int bit = 1 << 30; bit > 0; bit /= 2) {
    const int higher = last | bit;
    if (bit <= sources && count_block(sources, [&](int s) { return key[s] == least && s < higher; }) < ties) {
      last = higher;
    }
  }
  return {least, last};
}

// Writes the index maps of sample b, by all threads of a block. `target(s)` is the target of source s.
template <typename Target>
__device__ inline void write_maps(const Match& p, int64_t b, const uint64_t* key, Target target, Counts& counts) {
  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int outputs = p.tokens - p.r, first_source = p.first_source();
  const Chosen chosen = choose_sources(p, key);
  const int part = (p.tokens + THREADS - 1) / THREADS * WARP;
  const int begin = warp * part, end = begin + part < p.tokens ? begin + part : p.tokens;
  const auto fate_of = [&](int n) {
    if (n >= end) return FATES;
    if (n < p.prefix) return PREFIX;
    if (!p.real(b, n)) return PADDING;
    if (n % 2) return TARGET;
    const int s = (n - first_source) / 2;
    return chosen(key[s], s) ? MERGED : SOURCE;
  };

  int found[FATES] = {};
#pragma unroll 1
  for (int from = begin; from < end; from += WARP) {
    const Fate fate = fate_of(from + lane);
#pragma unroll
    for (int f = 0; f < FATES; ++f) found[f] += __popc(__ballot_sync(~0u, fate == f));
  }
#pragma unroll
  for (int f = 0; f < FATES; ++f) {
    if (lane == 0) counts.of[f][warp] = found[f];
  }
  __syncthreads();  // counts are there

  int row[FATES];  // of the next token of each fate
  int before = 0;
#pragma unroll
  for (int f = 0; f < FATES; ++f) {
    row[f] = before;
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) {
      const int more = counts.of[f][w];
      if (w < warp) row[f] += more;
      before += more;
    }
  }
  int64_t* assignment = p.assignment + b * p.tokens;
#pragma unroll 1
  for (int from = begin; from < end; from += WARP) {
    const int n = from + lane;
    const Fate fate = fate_of(n);
    int own = 0;
#pragma unroll
    for (int f = 0; f < FATES; ++f) {
      const unsigned alike = __ballot_sync(~0u, fate == f);
      if (fate == f) own = row[f] + __popc(alike & ((1u << lane) - 1));
      row[f] += __popc(alike);
    }
    if (fate == FATES) continue;
    if (fate != MERGED) assignment[n] = own < outputs ? own : outputs - 1;
    if (own < outputs) {
      p.kept[b * outputs + own] = n;
    } else {
      p.removed[b * p.r + own - outputs] = n;
    }
    if (p.mask == nullptr) continue;
    if (own < outputs) p.merged_mask[b * outputs + own] = p.real(b, n);
    p.dropped[b * p.tokens + n] = fate != MERGED && own >= outputs;
  }
  __syncthreads();  // the places of targets are there
  for (int s = thread; s < p.sources(); s += THREADS) {
    const int n = first_source + 2 * s;
    if (chosen(key[s], s)) assignment[n] = assignment[p.first_target() + 2 * int64_t(target(s))];
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

constexpr int MOST_SOURCES = Match::ONE_LAUNCH / 2;
constexpr int LARGE = 2;  // SIDE of the tiles where 64 rows are not enough

// That a multiprocessor is to hold: of sm_75, the shared memory holds no two.
#if __CUDA_ARCH__ >= 800
template <int SIDE>
constexpr int BLOCKS = SIDE == 1 ? 2 : 1;
#else
template <int SIDE>
constexpr int BLOCKS = 1;
#endif

// What a block keeps of its sample, besides a tile.
struct alignas(16) Sample {
  uint64_t key[MOST_SOURCES];
  uint16_t target[MOST_SOURCES];
  Counts counts;
};

template <typename T, int SIDE>
__global__ void __launch_bounds__(THREADS, BLOCKS<SIDE>) merging_match_kernel(const __grid_constant__ Match p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Sample& sample = *reinterpret_cast<Sample*>(memory);
  TileState<SIDE>& state = *reinterpret_cast<TileState<SIDE>*>(memory + sizeof(Sample));
  uint32_t* operands = reinterpret_cast<uint32_t*>(memory + sizeof(Sample) + sizeof(TileState<SIDE>));
  const int64_t b = blockIdx.x;
  const int sources = p.sources();
  for (int first = 0; first < sources; first += TILE<SIDE>) {
    const int count = sources - first < TILE<SIDE> ? sources - first : TILE<SIDE>;
    find_best<T, SIDE>(p, b, first, count, state, operands);
    for (int i = threadIdx.x; i < count; i += THREADS) {
      sample.key[first + i] = key_of(p, b, p.first_source() + 2 * (first + i), state.similarity[i]);
      sample.target[first + i] = uint16_t(state.target[i]);
    }
    __syncthreads();  // the next sources may take their places
  }
  write_maps(p, b, sample.key, [&](int s) { return sample.target[s]; }, sample.counts);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) merging_match_similarities_kernel(const __grid_constant__ Match p) {
  extern __shared__ __align__(16) unsigned char memory[];
  TileState<LARGE>& state = *reinterpret_cast<TileState<LARGE>*>(memory);
  uint32_t* operands = reinterpret_cast<uint32_t*>(memory + sizeof(TileState<LARGE>));
  const int sources = p.sources(), tiles = int(ceil_div(sources, TILE<LARGE>));
  const int64_t b = blockIdx.x / tiles;
  const int first = int(blockIdx.x % tiles) * TILE<LARGE>;
  const int count = sources - first < TILE<LARGE> ? sources - first : TILE<LARGE>;
  find_best<T, LARGE>(p, b, first, count, state, operands);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    p.key[b * sources + first + i] = key_of(p, b, p.first_source() + 2 * (first + i), state.similarity[i]);
    p.target[b * sources + first + i] = state.target[i];
  }
}

__global__ void __launch_bounds__(THREADS, 2) merging_match_maps_kernel(const __grid_constant__ Match p) {
  __shared__ Counts counts;
  const int64_t b = blockIdx.x, first = b * p.sources();
  write_maps(p, b, p.key + first, [&](int s) { return p.target[first + s]; }, counts);
}

int side(const Match& p) { return p.sources() <= TILE<1> && p.targets() <= TILE<1> ? 1 : LARGE; }

bool one_launch(const Match& p) { return p.tokens <= Match::ONE_LAUNCH; }

size_t shared_bytes(const Match& p, int stages) {
  const size_t tile = side(p) == 1 ? sizeof(TileState<1>) : sizeof(TileState<LARGE>);
  const size_t operands = 4 * size_t(side(p) == 1 ? OPERANDS<1> : OPERANDS<LARGE>) * size_t(stages);
  return (one_launch(p) ? sizeof(Sample) : 0) + tile + operands;
}

template <typename Kernel>
void launch(Kernel kernel, int64_t blocks, const Match& p, cudaStream_t stream) {
  const size_t bytes = shared_bytes(p, p.stages);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  kernel<<<unsigned(blocks), THREADS, bytes, stream>>>(p);
}

template <typename T>
void match_as(const Match& p, cudaStream_t stream) {
  const int64_t blocks = match_blocks(p);
  if (one_launch(p)) {
    return side(p) == 1 ? launch(merging_match_kernel<T, 1>, blocks, p, stream)
                        : launch(merging_match_kernel<T, LARGE>, blocks, p, stream);
  }
  launch(merging_match_similarities_kernel<T>, blocks, p, stream);
  merging_match_maps_kernel<<<unsigned(p.batch), THREADS, 0, stream>>>(p);
}

}  // namespace

void choose_stages(Match& p) {
  int index = 0, shared = 0, reserved = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, index);
  p.stages = shared_bytes(p, 2) + size_t(reserved) <= size_t(shared) ? 2 : 1;
}

int64_t match_blocks(const Match& p) { return p.batch * (one_launch(p) ? 1 : ceil_div(p.sources(), TILE<LARGE>)); }

void match(const Match& p, cudaStream_t stream) {
  dispatch(p.type, [&](auto element) { match_as<decltype(element)>(p, stream); });
}

}  // namespace mlip::cuda::merging
