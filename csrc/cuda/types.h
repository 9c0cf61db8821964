// What every CUDA kernel shares: element types, 16-byte accesses, the shape of a launch. No torch headers.
#pragma once
#include <cstdint>

// Of functions that device code calls too: headers are also read by compilers that know no devices.
#ifdef __CUDACC__
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

struct Launch {
  int64_t grid_x, grid_y;
  int block_x, block_y;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mlip::cuda
