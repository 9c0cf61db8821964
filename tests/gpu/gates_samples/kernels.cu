// CUDA kernels with one virtue or one vice each, for the gates to notice.

// Transposes 32 x 32 tiles through shared memory; without PADDING every column lies in one bank.
template <int PADDING>
__device__ void transpose(const float* x, float* y, int rows, int columns) {
  __shared__ float tile[32][32 + PADDING];
  const int row = blockIdx.y * 32, column = blockIdx.x * 32;
  tile[threadIdx.y][threadIdx.x] = x[(row + threadIdx.y) * columns + column + threadIdx.x];
  __syncthreads();
  y[(column + threadIdx.y) * rows + row + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}

extern "C" __global__ void padded(const float* x, float* y, int rows, int columns) {
  transpose<1>(x, y, rows, columns);
}
extern "C" __global__ void in_one_bank(const float* x, float* y, int rows, int columns) {
  transpose<0>(x, y, rows, columns);
}

// 48 running products per thread; `cramped` may use 32 registers only.
__device__ void products(const float* x, float* y) {
  float running[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) running[i] = x[i * 1024 + threadIdx.x];
  for (int n = 1; n < 100; ++n) {
#pragma unroll
    for (int i = 0; i < 48; ++i) running[i] *= x[n + i] + running[(i + 1) % 48];
  }
#pragma unroll
  for (int i = 0; i < 48; ++i) y[i * 1024 + threadIdx.x] = running[i];
}

extern "C" __global__ void __launch_bounds__(1024, 1) roomy(const float* x, float* y) { products(x, y); }
extern "C" __global__ void __launch_bounds__(1024, 2) cramped(const float* x, float* y) { products(x, y); }
