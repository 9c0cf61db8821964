// Elements of tensors as CUDA kernels of all families see them: their types, how they are read, written and copied, and
// products of small matrices of them on tensor cores. Compilers that know no devices read the first part only. No torch
// headers.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MLIP_HOST_DEVICE __host__ __device__
#else
#define MLIP_HOST_DEVICE
#endif

namespace mlip::cuda {

// An element of a mask. Torch takes any byte but 0 for true, as a condition on this does. What a C++ bool does that
// holds another byte than 0 or 1 is not defined, so nothing reads masks as one.
using Flag = uint8_t;

enum class Type { float32, float16, bfloat16 };

constexpr int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Elements in one 16-byte access.
constexpr int64_t vector_of(Type type) { return 16 / size_of(type); }

constexpr int WARP = 32;
constexpr int64_t LARGEST_GRID = 0x7fffffff;  // blocks of one launch

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__

// --- reading and writing, as float, V elements at a time -------------------------------------------------------------

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// V elements that lie together and move in one access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T element[V];
};

template <int V, typename T>
__device__ inline void load(const T* from, float (&to)[V]) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = widen(pack.element[v]);
}

template <int V, typename T>
__device__ inline void store(T* to, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.element[v] = narrow<T>(from[v]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Copies 16 bytes at `from`, or zeros, to shared memory: in the background where the GPU can. Without a branch, so that
// the lanes of a warp stay together.
__device__ inline void copy_vector(uint32_t* to, const void* from, bool in_bounds) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from),
               "r"(in_bounds ? 16 : 0)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = in_bounds ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// --- products on tensor cores ----------------------------------------------------------------------------------------

// Products of 16x8 and 8x8 matrices by the tensor cores of a warp, as accurate as float32.
//
// TF32 keeps 11 bits of a float, so a float is the sum of three of them: high + low + lowest. Of the nine products of
// parts, five remain, the others are below the rounding of float32. Lane 4 g + t holds, with g in 0..7 and t in 0..3,
//
//   a  [row g, column t], [g + 8, t], [g, t + 4], [g + 8, t + 4]
//   b  [row t, column g], [t + 4, g]
//   d  [row g, column 2 t], [g, 2 t + 1], [g + 8, 2 t], [g + 8, 2 t + 1]
//
// Half precision is multiplied as it is, two elements in each place of a and b: its products are exact in float32.
//
// Before sm_80 there is no TF32 and no bfloat16: the lanes then exchange their elements and use float32 arithmetic.

// A float as the sum of three of 11 bits.
template <int N>
struct Split {
  float high[N], low[N], lowest[N];
};

__device__ inline float to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return value;
#endif
}

template <int N>
__device__ inline Split<N> split(const float (&value)[N]) {
  Split<N> parts;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    parts.high[i] = to_tf32(value[i]);
    const float rest = value[i] - parts.high[i];
    parts.low[i] = to_tf32(rest);
    parts.lowest[i] = to_tf32(rest - parts.low[i]);
  }
  return parts;
}

#if __CUDA_ARCH__ >= 800
__device__ inline void multiply_add_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#else
__device__ inline void multiply_add_float32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;  // lanes with d's row of a, column of b
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1  // little code for an old GPU
    for (int k = 0; k < 4; ++k) {
      const float upper = __shfl_sync(~0u, a[2 * half], row + k), lower = __shfl_sync(~0u, a[2 * half + 1], row + k);
      const float even = __shfl_sync(~0u, b[half], column + k), odd = __shfl_sync(~0u, b[half], column + 4 + k);
      d[0] += upper * even;
      d[1] += upper * odd;
      d[2] += lower * even;
      d[3] += lower * odd;
    }
  }
}
#endif

// d += a b, by all lanes of a warp. What is not `exact` rounds b to TF32, which loses nothing of half precision, and a
// to the 22 bits of two parts, with which a matrix is about as orthogonal as in float32.
__device__ inline void multiply_add(float (&d)[4], const Split<4>& a, const Split<2>& b, bool exact) {
#if __CUDA_ARCH__ >= 800
  if (exact) {
    multiply_add_tf32(d, a.lowest, b.high);
    multiply_add_tf32(d, a.high, b.lowest);
    multiply_add_tf32(d, a.high, b.low);
  }
  multiply_add_tf32(d, a.low, b.high);
  multiply_add_tf32(d, a.high, b.high);
#else
  multiply_add_float32(d, a.high, b.high);
#endif
}

// d += a b for 16 columns of a that are in half precision: a 32-bit word has two that are neighbours, the lower first.
#if __CUDA_ARCH__ >= 800
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
__device__ inline float upper_half(uint32_t word, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ inline float upper_half(uint32_t word, __nv_bfloat16) { return __uint_as_float(word & 0xffff0000u); }

template <typename T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
#pragma unroll 1
  for (int shift = 16; shift >= 0; shift -= 16) {
    float left[4], right[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = upper_half(a[i] << shift, type);
#pragma unroll
    for (int i = 0; i < 2; ++i) right[i] = upper_half(b[i] << shift, type);
    multiply_add_float32(d, left, right);
  }
}
#endif

// --- launches by element type ----------------------------------------------------------------------------------------

// Calls `launch(element)` with an element of a type.
template <typename Launch>
void dispatch(Type type, Launch launch) {
  switch (type) {
    case Type::float32:
      return launch(float{});
    case Type::float16:
      return launch(__half{});
    case Type::bfloat16:
      return launch(__nv_bfloat16{});
  }
}

// The same with how many of them move in one access, as a second argument: 16 bytes, or one where rows are no vectors.
template <typename Launch>
void dispatch(Type type, bool vector, Launch launch) {
  dispatch(type, [&](auto element) {
    using V = std::integral_constant<int, 16 / sizeof(element)>;
    return vector ? launch(element, V{}) : launch(element, std::integral_constant<int, 1>{});
  });
}

#endif  // __CUDACC__

}  // namespace mlip::cuda
