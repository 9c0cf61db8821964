// Matrices of the spectral family as the CPU kernels take them.
#pragma once
#include "bindings/tensors.h"
#include "cpu/spectral/lines.h"

namespace mlip::bindings {

// A matrix [M, N] with any strides.
template <typename A>
cpu::Matrix<A> matrix(const Tensor& tensor) {
  return {data<A>(tensor), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

template <typename A>
cpu::Line<A> line(const Tensor& tensor) {
  return cpu::Line<A>(matrix<A>(tensor));
}

template <typename A>
cpu::Line<A> line(const std::optional<Tensor>& tensor) {
  return tensor ? cpu::Line<A>(matrix<A>(*tensor)) : cpu::Line<A>();
}

// The complex map of [2, M, N]: real, imaginary part.
template <typename A>
cpu::Line<A> complex_line(const std::optional<Tensor>& tensor) {
  if (!tensor) return cpu::Line<A>();
  const cpu::Matrix<A> real{data<A>(*tensor), tensor->size(1), tensor->size(2), tensor->stride(1), tensor->stride(2)};
  cpu::Matrix<A> imaginary = real;
  imaginary.data += tensor->stride(0);
  return cpu::Line<A>(real, imaginary);
}

// What every operator of the family is called with: tokens [B, prefix + height * width, D], matrices in the dtype that
// x accumulates in, along_w [W', columns], along_h [H', height], or [2, H', height] where it is complex.
inline void check_axis(const char* name, const Tensor& tensor, bool complex, int64_t columns, ScalarType type) {
  check_matrix(name, tensor, complex);
  MLIP_CHECK(tensor.size(-1) == columns, name, ": expected ", columns, " columns, got ", tensor.size(-1));
  MLIP_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", type, ", got ", tensor.scalar_type());
}

inline void check_tokens(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w, bool complex,
                         int64_t height, int64_t width, int64_t prefix) {
  MLIP_CHECK(x.dim() == 3, "x: expected [B, N, D]");
  MLIP_CHECK(prefix >= 0 && height >= 1 && width >= 1 && x.size(1) == prefix + height * width,
             "x: expected prefix_tokens + height * width tokens, got ", x.size(1));
  const ScalarType wide = accumulate_in(x.scalar_type());
  if (along_h) check_axis("along_h", *along_h, complex, height, wide);
  check_axis("along_w", along_w, false, width, wide);
}

}  // namespace mlip::bindings
