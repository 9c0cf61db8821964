// Each expression as a kernel: one element per thread.
#include <climits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ int population_count(unsigned x) { return __popc(x); }
__device__ int population_count64(unsigned long long x) { return __popcll(x); }
__device__ int leading_zero_count(unsigned x) { return __clz(x); }
__device__ int lowest_set_bit(unsigned x) { return __ffs(x); }
__device__ unsigned reverse_bits(unsigned x) { return __brev(x); }
__device__ unsigned funnel_shift_left(unsigned high, unsigned low, unsigned by) {
  return __funnelshift_l(low, high, by);
}
__device__ unsigned long long upper_half_of_product(unsigned long long a, unsigned long long b) {
  return __umul64hi(a, b);
}
__device__ unsigned bits(float x) { return __float_as_uint(x); }
__device__ float float_from(unsigned x) { return __uint_as_float(x); }
__device__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ bool is_nan(float x) { return isnan(x); }
__device__ bool is_infinite(float x) { return isinf(x); }
__device__ bool is_finite(float x) { return isfinite(x); }
__device__ bool sign_bit(float x) { return signbit(x); }

#define EXPRESSION(name, Operand, Result, expression)                                                           \
  extern "C" __global__ void device_##name(const Operand* as, const Operand* bs, const Operand* cs, Result* to, \
                                           int count) {                                                         \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                                        \
    if (i >= count) return;                                                                                     \
    const Operand a = as[i], b = bs[i], c = cs[i];                                                              \
    to[i] = static_cast<Result>(expression);                                                                    \
  }
#include "expressions.h"
