// What the bindings of all parts share: checks and views of torch tensors, through the stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>

namespace mlip::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... message) {
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// Raises RuntimeError with this message and no more. STD_TORCH_CHECK puts the path of the source before it, a folder of
// the machine that built this.
#define MLIP_CHECK(condition, ...)                         \
  do {                                                     \
    if (!(condition)) ::mlip::bindings::fail(__VA_ARGS__); \
  } while (false)

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
  static_assert(!std::is_same_v<T, bool>, "masks are read as flags");
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

// The bytes of a mask, of which any but 0 is true.
inline const uint8_t* flags_or_null(const std::optional<Tensor>& mask) { return data_or_null<uint8_t>(mask); }

// The public functions check arguments with messages for users; these keep a direct call of the operator from reading
// outside its tensors.
inline void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType type) {
  bool same = tensor.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) {
    same = same && tensor.size(i) == size;
    ++i;
  }
  MLIP_CHECK(same, name, ": unexpected shape");
  MLIP_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", type, ", got ", tensor.scalar_type());
}

// A matrix [M, N], or [2, M, N] with real and imaginary part. A kernel may take one without rows or columns for none.
inline void check_matrix(const char* name, const Tensor& tensor, bool complex) {
  MLIP_CHECK(tensor.dim() == (complex ? 3 : 2) && (!complex || tensor.size(0) == 2), name, ": expected ",
             complex ? "[2, M, N]" : "[M, N]");
  MLIP_CHECK(tensor.size(-2) >= 1 && tensor.size(-1) >= 1, name, ": expected at least one row and one column, got ",
             tensor.size(-2), " and ", tensor.size(-1));
}

inline void check_prefix(int64_t prefix, int64_t tokens) {
  MLIP_CHECK(0 <= prefix && prefix < tokens, "prefix_tokens: expected 0 <= prefix_tokens < ", tokens, ", got ", prefix);
}

}  // namespace mlip::bindings
