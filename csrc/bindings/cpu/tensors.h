// What the bindings of the CPU part share: element types, torch's threads, and outputs that the caller gives.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "bindings/tensors.h"
#include "cpu/simd.h"

namespace mlip::bindings {

using torch::stable::parallel_for;

// Calls function(T{}) with the element type of the CPU kernels.
template <typename Function>
void for_type(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(cpu::BFloat16{});
    case ScalarType::Half:
      return function(cpu::Half{});
    default:
      fail("mlip_kernels: no CPU kernel for dtype ", type);
  }
}

// Tasks per thread such that a thread gets at least 32k elements: below that, waking it costs more than it saves.
inline int64_t grain(int64_t elements_per_task) {
  const int64_t tasks = 32768 / (elements_per_task > 0 ? elements_per_task : 1);
  return tasks > 1 ? tasks : 1;
}

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

// Where an operator that is given its output writes: `result` is `out` itself, or contiguous memory of its own where
// `out` is not contiguous or shares memory with one of the `others`, which are read while it is written; `deliver` then
// copies it to `out`.
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
