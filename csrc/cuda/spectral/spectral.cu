// Spectral operators on tokens x [B, prefix + H W, D] of a grid, for every channel. On the token axis, H = 1 and
// matrices named h are left out. One pass over memory each, bound by it: 7 to 24 flops per byte on grids of 14 x 14 to
// 24 x 24. A block owns 32 channels, and goes from batch element to batch element (run_passes.cuh).
//
//   separable         Y = A_h X A_w^T               A_h [H', H], A_w [W', W]; prefix tokens are copied
//   analysis          Z = M_h (X R_w^T)             M_h [2, H', H], R_w [2 K, W]: real, imaginary part; without prefix
//   synthesis         X = (M_h Z) S_w^T             M_h [2, H', H], S_w [W', 2 K]; prefix tokens are 0
//   filtered          Y = F^* (w * F X)             w [H, W, D], Fourier [H, K, D, 2]; prefix tokens are copied
//     its gradient    dw = sum_b m (F G) conj(F X)  G [B, prefix + H W, D]
//   band_energy       e_j = sum_c m_c |F X|_c^2     over the coefficients c of band j; bands [coefficients] int32
//     its gradient    dX = 2 F^* (m g (F X))        g [B, bands, D]; 0 for the prefix
//   token_energy      e_n = sum_d (P X)_nd^2        P = F^* mask F, mask [coefficients] 1 or 0; 0 for the prefix
//     its gradient    dX = 2 P (g P X)              g [B, prefix + H W], since P is a projection; 0 for the prefix
//
// F is orthonormal: A_h [H, H], A_w [W, W] (cosine) or M_h [2, H, H], R_w [2 K, W] (Fourier). m is 2 for coefficients
// that have a mirror image, else 1. Tokens, spectra and bands are float32, float16 or bfloat16, the rest float32.
//
//   kernel                   reads                      writes                    flops
//   separable                B (prefix + H W) D         B (prefix + H' W') D      2 B D W' H (W + H')
//   analysis                 B H W D                    2 B H' K D                2 B D K H (2 W + 4 H')
//   synthesis                2 B H K D                  B (prefix + H' W') D      2 B D K H' (4 H + 2 W')
//   filtered                 B (prefix + H W) D and w   B (prefix + H W) D        cosine 4 B D H W (H + W)
//                                                                                 Fourier 4 B D H K (4 H + 2 W)
//   filtered_backward_weight 2 B H W D                  splits |w| partial sums   as filtered
//   band_energy              B H W D                    B bands D                 as separable or analysis
//   band_energy_backward     B H W D, B bands D         B (prefix + H W) D        as filtered
//   token_energy             B H W D                    B H W D / 32 partial sums as filtered
//   token_energy_backward    B H W D, B H W D / 32 g    B (prefix + H W) D        twice those of filtered
//
// Matrices are read once per block. Tensor cores do five times these flops, twice for bfloat16. Partial sums are added
// in order by a second kernel: no atomics, the same bits from run to run.
//
// Real and imaginary part of a coefficient are products of the same lane, as rows g and g + 8 of its matrix; so a
// complex matrix is (c, s; -s, c) in a lane.
#include "cuda/spectral/spectral.h"

#include "cuda/spectral/run_passes.cuh"

namespace mlip::cuda::spectral {
namespace {

constexpr unsigned SEPARABLE = bit(Output::tile) | bit(Output::tokens);
constexpr unsigned ANALYSIS = bit(Output::tile) | bit(Output::spectrum);
constexpr unsigned FILTERED = bit(Output::tile) | bit(Output::weighted) | bit(Output::tokens);
constexpr unsigned WEIGHT_GRADIENT = bit(Output::tile) | bit(Output::products);
constexpr unsigned BANDS = bit(Output::tile) | bit(Output::powers);
constexpr unsigned BANDS_BACKWARD = bit(Output::tile) | bit(Output::band_gradients) | bit(Output::tokens);
constexpr unsigned ENERGY = bit(Output::tile) | bit(Output::masked) | bit(Output::energies);
constexpr unsigned ENERGY_BACKWARD =
    bit(Output::tile) | bit(Output::masked) | bit(Output::scaled) | bit(Output::tokens);
constexpr int FINISH_THREADS = 256;
constexpr int SUMS = 4;  // of a band, running at once

// --- kernels ---------------------------------------------------------------------------------------------------------

// The last tile has the power of each coefficient. A warp owns a band, a lane a channel, and adds them in order.
__device__ inline void add_bands(const SpectralProblem& p, const Block& block, int64_t b) {
  const float* tile = block.tile(p.passes[p.num_passes - 1].to);
  const int* bands = static_cast<const int*>(block.table);
  const int64_t channel = block.first_channel + block.lane;
  for (int64_t band = block.warp; band < p.band_count; band += WARPS) {
    float sums[SUMS] = {};
    for (int first = 0, row = 0; first < p.coefficients; first += p.frequencies, row += p.pitch) {
#pragma unroll 1
      for (int k = 0; k < p.frequencies; k += SUMS) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
          if (k + i < p.frequencies && bands[first + k + i] == band) sums[i] += tile[at(row + k + i, block.lane)];
        }
      }
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (channel < p.channels) put(p.out, p.type, (b * p.band_count + band) * p.channels + channel, sum);
  }
  __syncthreads();
}

__device__ inline void nothing(const SpectralProblem&, const Block&, int64_t) {}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_separable_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<SEPARABLE>(p, nothing);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_analysis_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<ANALYSIS>(p, nothing);
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_synthesis_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<SEPARABLE>(p, nothing);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) spectral_filtered_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<FILTERED>(p, nothing);
}

__global__ void __launch_bounds__(THREADS, BLOCKS - 1)
    spectral_filtered_backward_weight_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<WEIGHT_GRADIENT>(p, nothing);
}

__global__ void __launch_bounds__(FINISH_THREADS)
    spectral_filtered_backward_weight_finish_kernel(const float* partial, float* grad_weight, int64_t count,
                                                    int64_t splits) {
  const int64_t i = blockIdx.x * int64_t(FINISH_THREADS) + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * count + i];
  grad_weight[i] = sum;
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_band_energy_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<BANDS>(p, add_bands);
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_band_energy_backward_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<BANDS_BACKWARD>(p, nothing);
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_token_energy_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<ENERGY>(p, nothing);
}

__global__ void __launch_bounds__(FINISH_THREADS)
    spectral_token_energy_finish_kernel(const float* partial, float* energy, int64_t batch, int64_t tokens,
                                        int64_t prefix, int64_t blocks) {
  const int64_t i = blockIdx.x * int64_t(FINISH_THREADS) + threadIdx.x;
  if (i >= batch * (prefix + tokens)) return;
  const int64_t b = i / (prefix + tokens), n = i % (prefix + tokens) - prefix;
  float sum = 0.0f;
  if (n >= 0) {
    for (int64_t block = 0; block < blocks; ++block) sum += partial[(block * batch + b) * tokens + n];
  }
  energy[i] = sum;
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    spectral_token_energy_backward_kernel(const __grid_constant__ SpectralProblem p) {
  run_passes<ENERGY_BACKWARD>(p, nothing);
}

// --- grid and shared memory ------------------------------------------------------------------------------------------

// A block has 32 channels and goes through every `splits`-th batch element. What does not depend on the element, such
// as the matrices and the weight of a filter, is read once per block. So there are as many blocks as the GPU holds at
// once, and no more: with fewer, some of it would idle; with more, the later ones would only read all that again, and
// the last of them would have the GPU for themselves. Then each has batch / splits elements, give or take one: 29 where
// 256 elements of 768 channels meet the 2 x 108 blocks of an A100, for which a weight as large as the tokens, read and
// written in half precision, is 1 / 30 of what a block moves.

constexpr int64_t MOST_SPLITS = 0xffff;  // rows of blocks in one launch
constexpr int BLOCKS_CACHING = 2;        // on a multiprocessor, unless tiles alone leave room for one only

// What the current GPU has.
struct Device {
  int multiprocessors = 0;
  int shared = 0, reserved = 0;  // bytes: of a multiprocessor, and what each block costs besides its own
};

Device current_device() {
  Device device;
  int index = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  cudaDeviceGetAttribute(&device.reserved, cudaDevAttrReservedSharedMemoryPerBlock, index);
  return device;
}

// At most `wanted` parts of the batch, and no more than it takes for the longest of them.
int64_t parts_of(const SpectralProblem& p, int64_t wanted) {
  const int64_t most = std::max<int64_t>(1, std::min(wanted, MOST_SPLITS));
  return ceil_div(p.batch, ceil_div(p.batch, most));
}

// Cuts the batch so that all blocks are on the GPU at once.
Kernel choose_grid(SpectralProblem& p, Kernel kernel) {
  const Device device = current_device();
  const int64_t fitting = device.shared / (shared_bytes(p) + device.reserved);
  const bool in_workspace = fitting == 0;  // what is left of shared memory then does not limit the blocks
  const int64_t resident = in_workspace || fitting > BLOCKS ? BLOCKS : fitting;
  p.splits = parts_of(p, device.multiprocessors * resident / column_blocks(p));
  return kernel;
}

// Caches as many of `rows`, of so many points each, as still allow two resident blocks per multiprocessor: while one
// waits for memory, the other computes. They may cost the third. Rows that are not cached are read again for every
// batch element.
void cache_rows(SpectralProblem& p, int64_t rows, int points) {
  const Device device = current_device();
  const int64_t without = shared_bytes(p) + device.reserved;
  const int blocks = BLOCKS_CACHING * without <= device.shared ? BLOCKS_CACHING : 1;
  const int64_t room = std::max<int64_t>(0, device.shared / blocks - without);
  p.cached_points = int(std::min(room / (points * POINT_BYTES), rows)) * points;
}

int table_of(const SpectralProblem& p) { return p.coefficients <= MOST_IN_TABLE ? p.coefficients : 0; }

// Asks for the shared memory of a kernel; whether it may have as much.
bool allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return true;
  const bool allowed = bytes < INT32_MAX && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                                 int(bytes)) == cudaSuccess;
  if (!allowed) cudaGetLastError();
  return allowed;
}

}  // namespace

int64_t workspace_bytes(Kernel kernel, const SpectralProblem& p) {
  return allow_shared(kernel, shared_bytes(p)) ? 0 : tile_bytes(p) * column_blocks(p) * p.splits;
}

void launch(Kernel kernel, const SpectralProblem& p, cudaStream_t stream) {
  const int64_t shared = shared_bytes(p);
  allow_shared(kernel, shared);
  const dim3 grid(unsigned(column_blocks(p)), unsigned(p.splits)), block(WARP, WARPS);
  kernel<<<grid, block, size_t(shared), stream>>>(p);
}

// --- operators -------------------------------------------------------------------------------------------------------

Kernel separable(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder(p, h, w, height, width).forward(Output::tokens);
  return choose_grid(p, spectral_separable_kernel);
}

Kernel analysis(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder(p, h, w, height, width).forward(Output::spectrum);
  return choose_grid(p, spectral_analysis_kernel);
}

Kernel synthesis(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int frequencies) {
  PassBuilder(p, h, w, height, frequencies, true).inverse(Output::tokens);
  return choose_grid(p, spectral_synthesis_kernel);
}

// A block caches the weights of its channels while it goes through the batch. Those that shared memory does not hold
// are read with every batch element, from the L2 cache: none on grids of up to 14 x 14, an eighth of them on grids of
// 16 x 16 in Fourier transforms with 164 KiB of shared memory, two thirds on grids of 24 x 24 in cosine transforms with
// 228 KiB.
Kernel filtered(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder builder(p, h, w, height, width);
  builder.forward(Output::weighted);
  builder.adjoint(Output::tokens);
  choose_grid(p, nullptr);
  const bool used_once = p.splits == p.batch && p.row_vector;  // each weight, in whole sectors
  if (!used_once) cache_rows(p, p.coefficients, p.fourier ? 2 : 1);
  return used_once ? spectral_filtered_kernel : choose_grid(p, spectral_filtered_kernel);
}

// Both spectra are computed again, which is cheaper than keeping them. A block adds to its partial sum in shared
// memory, one batch element after another, and writes it once. What shared memory does not hold is added to in global
// memory, that is in the L2 cache: on grids of 14 x 14 nothing in cosine transforms, in Fourier transforms nothing with
// 228 KiB and 46 of 112 coefficients with 164 KiB.
//
// Every partial sum costs another two |dW|, and to keep the bits the batch is cut by the shape alone: into the 216
// blocks that an A100 holds at once, two for each multiprocessor, but into 16 parts at most. Then 256 elements of 768
// channels make 9 parts, whose sums are 1 / 14 of what is moved in half precision.
Kernel filtered_backward_weight(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  constexpr int64_t BLOCKS_WANTED = 216, SPLITS_WANTED = 16;
  PassBuilder builder(p, h, w, height, width);
  builder.forward(Output::tile);
  builder.begin_second();
  builder.forward(Output::products);
  builder.share_fragments();
  p.splits = parts_of(p, std::min(BLOCKS_WANTED / column_blocks(p), SPLITS_WANTED));
  if (p.splits < p.batch || !p.row_vector) cache_rows(p, p.coefficients, p.fourier ? 2 : 1);
  return spectral_filtered_backward_weight_kernel;
}

void add_weight_gradients(const SpectralProblem& p, float* grad_weight, cudaStream_t stream) {
  if (p.splits == 1) return;  // the sums are the result
  const int64_t count = int64_t(p.coefficients) * p.channels * (p.fourier ? 2 : 1);
  const unsigned blocks = unsigned(ceil_div(count, FINISH_THREADS));
  spectral_filtered_backward_weight_finish_kernel<<<blocks, FINISH_THREADS, 0, stream>>>(p.partial, grad_weight, count,
                                                                                         p.splits);
}

Kernel band_energy(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder(p, h, w, height, width).forward(Output::powers);
  p.table = table_of(p);
  return choose_grid(p, spectral_band_energy_kernel);
}

// The gradients of the bands, which all coefficients look up, are cached with the tokens of each batch element.
Kernel band_energy_backward(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder builder(p, h, w, height, width);
  builder.forward(Output::band_gradients);
  builder.adjoint(Output::tokens);
  p.table = table_of(p);
  cache_rows(p, p.band_count, 1);
  return choose_grid(p, spectral_band_energy_backward_kernel);
}

Kernel token_energy(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder builder(p, h, w, height, width);
  builder.forward(Output::masked);
  builder.adjoint(Output::energies);
  p.table = table_of(p);
  return choose_grid(p, spectral_token_energy_kernel);
}

void add_token_energies(const SpectralProblem& p, float* energy, cudaStream_t stream) {
  const unsigned blocks = unsigned(ceil_div(p.batch * p.out_tokens, FINISH_THREADS));
  spectral_token_energy_finish_kernel<<<blocks, FINISH_THREADS, 0, stream>>>(
      p.partial, energy, p.batch, p.out_tokens - p.prefix, p.prefix, column_blocks(p));
}

Kernel token_energy_backward(SpectralProblem& p, const Matrix& h, const Matrix& w, int height, int width) {
  PassBuilder builder(p, h, w, height, width);
  for (const Output output : {Output::scaled, Output::tokens}) {
    builder.forward(Output::masked);
    builder.adjoint(output);
  }
  builder.share_fragments();
  p.table = table_of(p);
  return choose_grid(p, spectral_token_energy_backward_kernel);
}

}  // namespace mlip::cuda::spectral
