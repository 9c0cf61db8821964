// Small CUDA kernels that synchronise in all the usual ways; the tests delete one synchronisation after another.
#include <cstdint>
#include <cuda_bf16.h>

// One block of 128 threads per row.
extern "C" __global__ void softmax(const __nv_bfloat16* x, __nv_bfloat16* y, int columns) {
  __shared__ float partial[4];
  const int thread = threadIdx.x, warp = thread / 32;
  x += blockIdx.x * columns;
  y += blockIdx.x * columns;
  float largest = -INFINITY;
  for (int i = thread; i < columns; i += 128) largest = fmaxf(largest, __bfloat162float(x[i]));
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  if (thread % 32 == 0) partial[warp] = largest;
  __syncthreads();
  largest = fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
  __syncthreads();  // `partial` is used again
  float sum = 0;
  for (int i = thread; i < columns; i += 128) sum += __expf(__bfloat162float(x[i]) - largest);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (thread % 32 == 0) partial[warp] = sum;
  __syncthreads();
  sum = partial[0] + partial[1] + partial[2] + partial[3];
  for (int i = thread; i < columns; i += 128) {
    y[i] = __float2bfloat16(__expf(__bfloat162float(x[i]) - largest) / sum);
  }
}

constexpr int TILE = 16;

// Tiles through shared memory, 16 x 16 threads, one element each.
extern "C" __global__ void matmul(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float a_tile[TILE][TILE + 1], b_tile[TILE][TILE + 1];
  const int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
  float sum = 0;
  for (int start = 0; start < k; start += TILE) {
    a_tile[y][x] = row < m && start + x < k ? a[row * k + start + x] : 0;
    b_tile[y][x] = start + y < k && column < n ? b[(start + y) * n + column] : 0;
    __syncthreads();
    for (int step = 0; step < TILE; ++step) sum += a_tile[y][step] * b_tile[step][x];
    __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

// The largest element of each row, how often each column holds it, and the sum of the maxima. The tree ends within one
// warp, which needs only bar.warp.sync.
extern "C" __global__ void row_maxima(const float* x, int* indices, int* counts, float* total, int columns) {
  extern __shared__ float values[];
  int* const places = reinterpret_cast<int*>(values + blockDim.x);
  const int thread = threadIdx.x;
  float best = -INFINITY;
  int where = 0;
  for (int i = thread; i < columns; i += blockDim.x) {
    const float value = x[blockIdx.x * columns + i];
    if (value > best) best = value, where = i;
  }
  values[thread] = best;
  places[thread] = where;
  __syncthreads();
  const auto take_larger = [&](int step) {
    const float other = values[thread + step];
    if (other > values[thread] || (other == values[thread] && places[thread + step] < places[thread])) {
      values[thread] = other;
      places[thread] = places[thread + step];
    }
  };
  for (int step = blockDim.x / 2; step >= 32; step /= 2) {
    if (thread < step) take_larger(step);
    __syncthreads();
  }
  if (thread >= 32) return;
  for (int step = 16; step; step /= 2) {
    if (thread < step) take_larger(step);
    __syncwarp();
  }
  if (thread == 31) {  // not the thread that found it
    indices[blockIdx.x] = places[0];
    atomicAdd(counts + places[0], 1);
    atomicAdd(total, values[0]);
  }
}

__device__ unsigned shared_address(const void* pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }
__device__ void copy_16_bytes(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int in_flight>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(in_flight) : "memory");
}

// Two warps, each 16 rows of a tile of 32 x 8, with tensor cores; while one tile is multiplied the next is on its way.
extern "C" __global__ void matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n, int k) {
  __shared__ __align__(16) __nv_bfloat16 a_tile[2][32][16], b_tile[2][16][8];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = blockIdx.y * 32, column = blockIdx.x * 8;
  const auto load = [&](int stage, int start) {
    copy_16_bytes(&a_tile[stage][thread / 2][thread % 2 * 8], a + (row + thread / 2) * k + start + thread % 2 * 8);
    if (thread < 16) copy_16_bytes(b_tile[stage][thread], b + (start + thread) * n + column);
    commit();
  };
  float sums[4] = {};
  load(0, 0);
#pragma unroll 1
  for (int start = 0, stage = 0; start < k; start += 16, stage ^= 1) {
    if (start + 16 < k) {
      load(stage ^ 1, start + 16);
      wait<1>();
    } else {
      wait<0>();
    }
    __syncthreads();
    uint32_t x[4], y[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(&a_tile[stage][warp * 16 + lane % 16][lane / 16 * 8]))
                 : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(y[0]), "=r"(y[1])
                 : "r"(shared_address(b_tile[stage][lane % 16]))
                 : "memory");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    __syncthreads();  // before the next copy into this stage
  }
  for (int i = 0; i < 4; ++i) {
    c[(row + warp * 16 + lane / 4 + i / 2 * 8) * n + column + lane % 4 * 2 + i % 2] = sums[i];
  }
}
