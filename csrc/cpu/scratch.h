// Working memory of one thread.
#pragma once
#include <cstddef>
#include <cstring>
#include <new>

namespace mlip::cpu {

// Aligned to whole vectors and cache lines, and set to 0 unless told otherwise: what pads the last channels is a
// number.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes, bool zeroed = true) : memory(::operator new(bytes, ALIGNMENT)) {
    if (zeroed) std::memset(memory, 0, bytes);
  }
  ~Scratch() { ::operator delete(memory, ALIGNMENT); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* as() {
    return static_cast<T*>(memory);
  }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  void* memory;
};

}  // namespace mlip::cpu
