// Which columns of a tile a thread has, and how it reads and writes them. Device code only.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/types.h"

namespace mlip::cuda::contrastive {

constexpr int WARP = 32;

// The columns of a thread: V side by side, or 32 apart where rows do not move 16 bytes at a time.
template <typename T, int V, bool VECTOR>
struct Columns {
  int64_t first, columns;  // first of the thread, and how many there are
  __device__ Columns(int64_t tile, int64_t columns_)
      : first(tile * WARP * V + threadIdx.x % WARP * (VECTOR ? V : 1)), columns(columns_) {}
  __device__ int64_t at(int v) const { return first + v * (VECTOR ? 1 : WARP); }
  __device__ bool there(int v) const { return at(v) < columns; }

  // `otherwise` where no column is
  template <typename E>
  __device__ void read(const E* row, float otherwise, float (&to)[V]) const {
    if (VECTOR) {
      if (there(0)) {
        load<V>(row + first, to);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = otherwise;
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = there(v) ? widen(row[at(v)]) : otherwise;
    }
  }
  __device__ void write(T* row, const float (&from)[V]) const {
    if (VECTOR) {
      if (!there(0)) return;
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.element[v] = narrow<T>(from[v]);
      const uint4 bits = reinterpret_cast<const uint4&>(pack);
      // One access; of an assignment, the compiler makes several here.
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(row + first)), "r"(bits.x),
                   "r"(bits.y), "r"(bits.z), "r"(bits.w)
                   : "memory");
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (there(v)) row[at(v)] = narrow<T>(from[v]);
      }
    }
  }
  // To the places of the thread's columns in a tile.
  __device__ void put(float* tile, const float (&from)[V]) const {
    const int lane = threadIdx.x % WARP;
    if (VECTOR) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        *reinterpret_cast<float4*>(tile + lane * V + v) = make_float4(from[v], from[v + 1], from[v + 2], from[v + 3]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) tile[lane + v * WARP] = from[v];
    }
  }
  __device__ void get(const float* tile, float (&to)[V]) const {
    const int lane = threadIdx.x % WARP;
    if (VECTOR) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        const float4 four = *reinterpret_cast<const float4*>(tile + lane * V + v);
        to[v] = four.x, to[v + 1] = four.y, to[v + 2] = four.z, to[v + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = tile[lane + v * WARP];
    }
  }
};

}  // namespace mlip::cuda::contrastive
