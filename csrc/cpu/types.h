// Element types of tensors as the CPU kernels see them, and the type in which each is accumulated.
#pragma once
#include <cstdint>

namespace mlip::cpu {

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
