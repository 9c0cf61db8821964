// Element types of tensors as the CPU kernels see them, and the type in which each is accumulated.
#pragma once
#include <cstdint>

namespace mlip::cpu {

// An element of a mask. Torch takes any byte but 0 for true, as a condition on this does. What a C++ bool does that
// holds another byte than 0 or 1 is not defined, so nothing reads masks as one.
using Flag = uint8_t;

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename T>
struct AccumulateIn {
  using type = float;
};

template <>
struct AccumulateIn<double> {
  using type = double;
};

template <typename T>
using Accumulate = typename AccumulateIn<T>::type;

}  // namespace mlip::cpu
