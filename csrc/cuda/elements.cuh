// Reading and writing elements as float, V at a time. Device code only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mlip::cuda {

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

}  // namespace mlip::cuda
