// How the bindings of the CPU part choose an element type and share work among torch's threads.
#pragma once
#include "bindings/tensors.h"
#include "cpu/types.h"

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

}  // namespace mlip::bindings
