// What the bindings of all parts share: checks and views of torch tensors, through the stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace mlip::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 is accumulated in float64, everything else in float32.
inline ScalarType accumulate_in(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A tensor whose last dimension has unit stride: itself where it can be, else a contiguous copy.
inline Tensor with_unit_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// The public functions check arguments with messages for users; these keep a direct call of the operator from reading
// outside its tensors.
inline void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType type) {
  bool same = tensor.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) {
    same = same && tensor.size(i) == size;
    ++i;
  }
  STD_TORCH_CHECK(same, name, ": unexpected shape");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", type, ", got ", tensor.scalar_type());
}

inline void check_prefix(int64_t prefix, int64_t tokens) {
  STD_TORCH_CHECK(0 <= prefix && prefix < tokens, "prefix_tokens: expected 0 <= prefix_tokens < ", tokens, ", got ",
                  prefix);
}

}  // namespace mlip::bindings
