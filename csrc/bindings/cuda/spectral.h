// What the bindings of the spectral family's CUDA kernels share: tensors as the members of a `Map`.
#pragma once
#include "bindings/cuda/device.h"
#include "bindings/cuda/launch.h"
#include "bindings/cuda/types.h"
#include "cuda/spectral/stages.h"

namespace mlip::bindings::spectral {

using cuda::spectral::Map;
using cuda::spectral::Matrix;
using cuda::spectral::Tokens;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t MOST_TOKENS = 1 << 24;  // points are counted in 32 bits

// A matrix [rows, columns], or [2, rows, columns] with real and imaginary part; any strides.
inline Matrix matrix_of(const char* name, const Tensor& tensor, bool complex) {
  MLIP_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
  const int64_t first = complex ? 1 : 0;
  check_matrix(name, tensor, complex);
  MLIP_CHECK(tensor.size(first) < MOST_TOKENS && tensor.size(first + 1) < MOST_TOKENS, name, ": too large");
  return {data<float>(tensor),     tensor.stride(first),       tensor.stride(first + 1), complex ? tensor.stride(0) : 0,
          int(tensor.size(first)), int(tensor.size(first + 1))};
}

inline Matrix matrix_of(const char* name, const OptionalTensor& tensor, bool complex) {
  return tensor ? matrix_of(name, *tensor, complex) : Matrix{};
}

// Tokens [B, N, D] whose last dimension has unit stride.
inline Tokens tokens_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), rows_are_vectors(tensor)};
}

// What every map of tokens x [B, prefix + height width, D] has in common.
inline Map map_of(const Tensor& x, int64_t height, int64_t width, int64_t prefix, bool grid) {
  MLIP_CHECK(x.dim() == 3, "x: expected [B, N, D]");
  MLIP_CHECK(0 <= prefix && 0 < height && 0 < width && (grid || height == 1), "height, width: unexpected");
  MLIP_CHECK(x.size(1) == prefix + height * width && x.size(1) < MOST_TOKENS, "x: unexpected number of tokens");
  Map map{};
  map.type = cuda_type(x.scalar_type());
  map.batch = x.size(0);
  map.channels = x.size(2);
  map.prefix = int(prefix);
  map.width = int(width);
  map.exact = map.type != cuda::Type::bfloat16;
  return map;
}

inline void check_size(const char* name, int size, int64_t expected) {
  MLIP_CHECK(size == expected, name, ": expected ", expected, " rows or columns, got ", size);
}

struct Matrices {
  Matrix h, w;
};

// The matrices of an orthonormal map, cosine or Fourier, and the sizes of its spectrum.
inline Matrices orthonormal(Map& map, const OptionalTensor& along_h, const Tensor& along_w, int64_t height,
                            int64_t width, bool fourier) {
  const Matrices matrices{matrix_of("along_h", along_h, fourier), matrix_of("along_w", along_w, false)};
  map.fourier = fourier;
  map.frequencies = int(fourier ? width / 2 + 1 : width);
  map.coefficients = int(height) * map.frequencies;
  check_size("along_w", matrices.w.rows, (fourier ? 2 : 1) * map.frequencies);
  check_size("along_w", matrices.w.columns, width);
  if (along_h) check_size("along_h", matrices.h.rows, height);
  if (along_h) check_size("along_h", matrices.h.columns, height);
  return matrices;
}

// Memory for tiles that shared memory cannot hold; it has to live until the kernel is launched.
inline Tensor workspace(Map& map, const Tensor& like, int64_t bytes) {
  Tensor memory = torch::stable::new_empty(like, {bytes / 4}, ScalarType::Float);
  map.workspace = bytes ? mutable_data<float>(memory) : nullptr;
  return memory;
}

}  // namespace mlip::bindings::spectral
