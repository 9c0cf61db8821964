// Where the variant of an operator that is given its output writes.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "bindings/tensors.h"

namespace mlip::bindings {

struct Bytes {
  uintptr_t begin, end;
};

// The memory between the first and the last element.
inline Bytes bytes(const Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;  // strides are never negative
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  return {begin, begin + (last + 1) * tensor.element_size()};
}

// `result` is `out` itself, or contiguous memory of its own where `out` is not contiguous or shares memory with one of
// the `others`, which are read while it is written; `deliver` copies it to `out` then.
struct Destination {
  Tensor out, result;
  bool direct;

  Destination(const Tensor& out_, std::initializer_list<Tensor> others) : out(out_), result(out_) {
    direct = out.is_contiguous();
    const Bytes own = bytes(out);
    for (const Tensor& other : others) {
      const Bytes theirs = bytes(other);
      direct = direct && (own.end <= theirs.begin || theirs.end <= own.begin);
    }
    if (direct) return;
    std::vector<int64_t> shape(out.dim());
    for (int64_t axis = 0; axis < out.dim(); ++axis) shape[axis] = out.size(axis);
    result = torch::stable::new_empty(out, shape);
  }

  void deliver() const {
    if (direct) return;
    Tensor to = out;
    torch::stable::copy_(to, result);
  }
};

}  // namespace mlip::bindings
