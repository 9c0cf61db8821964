// Runtime choice of the instruction set.
//
// A kernel is written once, against the vectors of cpu/vector.h, in a file of its own (<operator>_kernels.h). The
// operator's .cpp compiles that file once per instruction set and calls the copy that fits the machine:
//
//   #define MLIP_KERNELS "cpu/merging/weighted_mean_kernels.h"
//   #include "cpu/simd_copies.h"
//   ... MLIP_CALL(weighted_mean_sums<T>, arguments...);
//
// The copies live in the namespaces mlip::cpu::{baseline, avx2, avx512}, so that no inline function compiled with
// AVX can be merged by the linker with one that must run on every machine. An operator that multiplies bfloat16 defines
// MLIP_BF16_COPY before it includes the copies: one more then lives in avx512_bf16, compiled with MLIP_BF16_DOT 1, and
// MLIP_CALL_BF16 prefers it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define MLIP_X86 1
#else
#define MLIP_X86 0
#endif

#if !MLIP_X86
#define MLIP_X86_BF16 0
#elif defined(__clang__)
#define MLIP_X86_BF16 (__clang_major__ >= 11)
#else
#define MLIP_X86_BF16 (__GNUC__ >= 10)
#endif

namespace mlip::cpu {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// What the processor has, capped by MLIP_KERNELS_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16; decided at the first
// call.
// Throws std::runtime_error if the variable holds anything else.
Capability capability();

}  // namespace mlip::cpu

#if MLIP_X86
#define MLIP_CALL(function, ...)               \
  switch (::mlip::cpu::capability()) {         \
    case ::mlip::cpu::Capability::avx512_bf16: \
    case ::mlip::cpu::Capability::avx512:      \
      return avx512::function(__VA_ARGS__);    \
    case ::mlip::cpu::Capability::avx2:        \
      return avx2::function(__VA_ARGS__);      \
    default:                                   \
      return baseline::function(__VA_ARGS__);  \
  }
#else
#define MLIP_CALL(function, ...) return baseline::function(__VA_ARGS__)
#endif

// The same for tokens of type T.
#if MLIP_X86_BF16
#define MLIP_CALL_BF16(T, function, ...)                                     \
  if constexpr (std::is_same_v<T, ::mlip::cpu::BFloat16>) {                  \
    if (::mlip::cpu::capability() == ::mlip::cpu::Capability::avx512_bf16) { \
      return avx512_bf16::function(__VA_ARGS__);                             \
    }                                                                        \
  }                                                                          \
  MLIP_CALL(function, __VA_ARGS__)
#else
#define MLIP_CALL_BF16(T, function, ...) MLIP_CALL(function, __VA_ARGS__)
#endif

// Defines mlip::cpu::function(problem, begin, end) for the problems of all element types: the variant of the function of
// that name in the file that MLIP_KERNELS named.
#define MLIP_DEFINE_DISPATCH(function, Problem)                                 \
  namespace mlip::cpu {                                                         \
  template <typename T>                                                         \
  void function(const Problem<T>& problem, int64_t begin, int64_t end) {        \
    MLIP_CALL(function<T>, problem, begin, end);                                \
  }                                                                             \
  template void function<float>(const Problem<float>&, int64_t, int64_t);       \
  template void function<double>(const Problem<double>&, int64_t, int64_t);     \
  template void function<BFloat16>(const Problem<BFloat16>&, int64_t, int64_t); \
  template void function<Half>(const Problem<Half>&, int64_t, int64_t);         \
  }
