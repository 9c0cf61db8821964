// What the bindings of the CUDA part read off a tensor: its element type, and whether its rows are vectors.
#pragma once
#include "bindings/tensors.h"
#include "cuda/types.h"

namespace mlip::bindings {

inline cuda::Type cuda_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return cuda::Type::float32;
    case ScalarType::Half:
      return cuda::Type::float16;
    case ScalarType::BFloat16:
      return cuda::Type::bfloat16;
    default:
      fail("mlip_kernels: no CUDA kernel for dtype ", type);
  }
}

// Whether every row of `tensor` (last dimension, unit stride) can be read 16 bytes at a time.
inline bool rows_are_vectors(const Tensor& tensor) {
  const int64_t vector = cuda::vector_of(cuda_type(tensor.scalar_type())), last = tensor.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.size(last) % vector == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (tensor.size(i) == 1 || tensor.stride(i) % vector == 0);
  return aligned;
}

}  // namespace mlip::bindings
