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
// memory up to N = 1024, where one block does all that a sample needs. The maps are made of them by maps.cuh.
//
// The pairs are those of the definition to the last tie: cosines that may decide are summed in float64. Where all
// tokens are alike, all of them are.
#include "cuda/merging/match.h"

#include <cuda_runtime_api.h>

#include "cuda/merging/maps.cuh"
#include "cuda/merging/similarities.cuh"

namespace mlip::cuda {
namespace merging {
namespace {

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
  uint16_t best[MOST_SOURCES];
  Counts<WARPS> counts;
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
      sample.best[first + i] = uint16_t(state.best[i]);
    }
    __syncthreads();  // the next sources may take their places
  }
  write_maps<WARPS>(p, b, sample.key, [&](int s) { return sample.best[s]; }, sample.counts);
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
    p.best[b * sources + first + i] = state.best[i];
  }
}

__global__ void __launch_bounds__(THREADS, 2) merging_match_maps_kernel(const __grid_constant__ Match p) {
  __shared__ Counts<WARPS> counts;
  const int64_t b = blockIdx.x, first = b * p.sources();
  write_maps<WARPS>(p, b, p.key + first, [&](int s) { return p.best[first + s]; }, counts);
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
}  // namespace merging

void match_plan(Match& p) {
  int index = 0, shared = 0, reserved = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, index);
  p.stages = merging::shared_bytes(p, 2) + size_t(reserved) <= size_t(shared) ? 2 : 1;
}

int64_t match_blocks(const Match& p) {
  return p.batch * (merging::one_launch(p) ? 1 : ceil_div(p.sources(), merging::TILE<merging::LARGE>));
}

void match(const Match& p, cudaStream_t stream) {
  switch (p.type) {
    case Type::float32:
      return merging::match_as<float>(p, stream);
    case Type::float16:
      return merging::match_as<__half>(p, stream);
    case Type::bfloat16:
      return merging::match_as<__nv_bfloat16>(p, stream);
  }
}

}  // namespace mlip::cuda
