#include "cpu/simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mlip::cpu {
namespace {

Capability supported() {
#if MLIP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if MLIP_X86_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::avx512_bf16;
#endif
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::baseline;
#else
  return Capability::baseline;
#endif
}

Capability cap() {
  const char* value = std::getenv("MLIP_KERNELS_CPU_CAPABILITY");
  const std::string name = value == nullptr ? "" : value;
  if (name.empty() || name == "avx512_bf16") return Capability::avx512_bf16;
  if (name == "avx512") return Capability::avx512;
  if (name == "avx2") return Capability::avx2;
  if (name == "baseline" || name == "default") return Capability::baseline;  // "default" is PyTorch's name
  throw std::runtime_error(
      "MLIP_KERNELS_CPU_CAPABILITY: expected 'baseline', 'avx2', 'avx512' or 'avx512_bf16', got '" + name + "'");
}

}  // namespace

Capability capability() {
  static const Capability chosen = [] {
    const Capability most = cap();
    const Capability has = supported();
    return has < most ? has : most;
  }();
  return chosen;
}

}  // namespace mlip::cpu

// For mlip_kernels/_loading.py: 0 to 3 as in Capability, -1 if the variable is not understood.
extern "C" __attribute__((visibility("default"))) int mlip_kernels_cpu_capability() {
  try {
    return static_cast<int>(mlip::cpu::capability());
  } catch (const std::runtime_error&) {
    return -1;
  }
}
