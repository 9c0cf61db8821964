// What every CPU kernel builds on: element types, scratch memory, the choice of the instruction set, and vectors.
//
// A kernel is written once and compiled once per instruction set. Its source names itself in MLIP_KERNELS; this header
// includes it again in each of the namespaces mlip::cpu::{baseline, avx2, avx512}, with MLIP_VECTOR_BYTES defined:
//
//   #include "cpu/spectral/filter.h"
//
//   #define MLIP_KERNELS "cpu/spectral/filter.cpp"  // this file, once per instruction set
//   #include "cpu/simd.h"
//
//   #ifdef MLIP_VECTOR_BYTES
//   template <typename T>
//   static void filtered(const Filtered<T>& problem, int64_t begin, int64_t end) { ... }
//   #else
//   MLIP_DEFINE_DISPATCH(filtered, Filtered)  // mlip::cpu::filtered calls the variant that fits the machine
//   #endif
//
// The namespaces keep the linker from merging an inline function compiled with AVX with one that must run on every
// machine. Headers of kernels may have a part under MLIP_VECTOR_BYTES too. A source that multiplies bfloat16 defines
// MLIP_BF16_VARIANT first: one more variant then lives in avx512_bf16, compiled with MLIP_BF16_DOT 1, and
// MLIP_DISPATCH_ISA_BF16 prefers it.
#ifndef MLIP_CPU_SIMD_H
#define MLIP_CPU_SIMD_H
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

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

// An element of a mask. Torch takes any byte but 0 for true, as a condition on this does. What a C++ bool does that
// holds another byte than 0 or 1 is not defined, so nothing reads masks as one.
using Flag = uint8_t;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// In what elements are accumulated.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Working memory of one thread, aligned to cache lines and whole vectors. It is set to 0 unless told otherwise, so that
// the padding behind the last channels is finite.
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

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// What the processor has, capped by MLIP_KERNELS_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16; decided at the first
// call. Throws std::runtime_error if the variable holds anything else.
Capability capability();

}  // namespace mlip::cpu

#if MLIP_X86
#define MLIP_DISPATCH_ISA(function, ...)       \
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
#define MLIP_DISPATCH_ISA(function, ...) return baseline::function(__VA_ARGS__)
#endif

// The same for elements of type T, which prefers avx512_bf16.
#if MLIP_X86_BF16
#define MLIP_DISPATCH_ISA_BF16(T, function, ...)                             \
  if constexpr (std::is_same_v<T, ::mlip::cpu::BFloat16>) {                  \
    if (::mlip::cpu::capability() == ::mlip::cpu::Capability::avx512_bf16) { \
      return avx512_bf16::function(__VA_ARGS__);                             \
    }                                                                        \
  }                                                                          \
  MLIP_DISPATCH_ISA(function, __VA_ARGS__)
#else
#define MLIP_DISPATCH_ISA_BF16(T, function, ...) MLIP_DISPATCH_ISA(function, __VA_ARGS__)
#endif

// Defines mlip::cpu::function(problem, begin, end) for all element types: it calls the variant of `function` that fits
// the machine.
#define MLIP_DEFINE_DISPATCH(function, Problem)                                 \
  namespace mlip::cpu {                                                         \
  template <typename T>                                                         \
  void function(const Problem<T>& problem, int64_t begin, int64_t end) {        \
    MLIP_DISPATCH_ISA(function<T>, problem, begin, end);                        \
  }                                                                             \
  template void function<float>(const Problem<float>&, int64_t, int64_t);       \
  template void function<double>(const Problem<double>&, int64_t, int64_t);     \
  template void function<BFloat16>(const Problem<BFloat16>&, int64_t, int64_t); \
  template void function<Half>(const Problem<Half>&, int64_t, int64_t);         \
  }
#endif  // MLIP_CPU_SIMD_H

#if defined(MLIP_VECTORS)  // included by itself, below

// Vectors of MLIP_VECTOR_BYTES bytes, in the compiler's own vector types: + - * / work lane by lane.
//
//   Vector<A>               A = float or double: what is computed in, LANES<A> lanes
//   load(T*), store(T*, v)  a whole vector of elements, widened to or rounded from Accumulate<T>
//   stream(T*, v)           store past the caches, aligned to the size of what is stored; in order after `fence()`
//   load(T*, n), store(T*, v, n)   only the first n elements; the other lanes are 0
//   broadcast<A>(a), sum(v), keep_finite(v)

#define MLIP_INLINE static inline __attribute__((always_inline))

template <typename A>
constexpr int LANES = MLIP_VECTOR_BYTES / int(sizeof(A));

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MLIP_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(MLIP_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MLIP_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(MLIP_VECTOR_BYTES)));
};

template <typename A>
using Vector = typename VectorOf<A>::type;
using Bits32 = VectorOf<float>::bits;
typedef uint16_t Bits16 __attribute__((vector_size(MLIP_VECTOR_BYTES / 2)));

template <typename A>
MLIP_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // unlike + 0, which turns -0 into 0, this takes no instruction
}

MLIP_INLINE Vector<float> load(const float* from) {
  Vector<float> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

MLIP_INLINE Vector<double> load(const double* from) {
  Vector<double> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// 16-bit patterns as 32-bit lanes and back; the compiler's own conversion takes detours.
MLIP_INLINE Bits32 widen_bits(const uint16_t* from) {
#if MLIP_VECTOR_BYTES == 64
  return (Bits32)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif MLIP_VECTOR_BYTES == 32
  return (Bits32)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Bits16 half;
  std::memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, Bits32);
#endif
}

MLIP_INLINE Bits16 narrow_bits(Bits32 bits) {
#if MLIP_VECTOR_BYTES == 64
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)bits);
#elif MLIP_VECTOR_BYTES == 32
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(bits, Bits16);
#endif
}

// The elements of a vector as they lie in memory, by `to`, which is not touched.
MLIP_INLINE Vector<float> rounded(const float*, Vector<float> v) { return v; }
MLIP_INLINE Vector<double> rounded(const double*, Vector<double> v) { return v; }

// bfloat16 is the upper half of a float; rounding is to nearest even, and NaN stays NaN.
MLIP_INLINE Vector<float> load(const BFloat16* from) { return (Vector<float>)(widen_bits(&from->bits) << 16); }

MLIP_INLINE Bits16 rounded(const BFloat16*, Vector<float> v) {
  const Bits32 bits = (Bits32)v;
  const Bits32 nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow_bits(v == v ? nearest : Bits32{} + 0x7fc0);
}

// IEEE half precision.
#if MLIP_VECTOR_BYTES == 64
MLIP_INLINE Vector<float> load(const Half* from) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
MLIP_INLINE Bits16 rounded(const Half*, Vector<float> v) {
  return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif MLIP_VECTOR_BYTES == 32
MLIP_INLINE Vector<float> load(const Half* from) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
MLIP_INLINE Bits16 rounded(const Half*, Vector<float> v) {
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// In integer arithmetic, for processors without conversion instructions.
MLIP_INLINE Vector<float> load(const Half* from) {
  const Bits32 half = widen_bits(&from->bits);
  const Bits32 normal = ((half & 0x7fff) << 13) + (112 << 23);
  const Bits32 subnormal = (Bits32)(__builtin_convertvector(half & 0x3ff, Vector<float>) * 0x1p-24f);
  const Bits32 exponent = half & 0x7c00;
  const Bits32 magnitude = exponent == 0 ? subnormal : exponent == 0x7c00 ? normal | 0x7f800000 : normal;
  return (Vector<float>)(magnitude | (half & 0x8000) << 16);
}
MLIP_INLINE Bits16 rounded(const Half*, Vector<float> v) {
  const Bits32 sign = ((Bits32)v >> 16) & 0x8000, bits = (Bits32)v & 0x7fffffff;
  const Bits32 normal = (bits + 0xfff + ((bits >> 13) & 1) - (112 << 23)) >> 13;
  const Bits32 subnormal = (Bits32)((Vector<float>)bits + 0.5f) - 0x3f000000;  // the addition rounds to 2^-24
  const Bits32 finite = bits < 0x38800000 ? subnormal : normal;
  const Bits32 infinite = Bits32{} + 0x7c00, nan = Bits32{} + 0x7e00;
  return narrow_bits(sign | (bits > 0x7f800000 ? nan : bits >= 0x477ff000 ? infinite : finite));
}
#endif

template <typename T>
MLIP_INLINE void store(T* to, Vector<Accumulate<T>> v) {
  const auto elements = rounded(to, v);
  std::memcpy(to, &elements, sizeof elements);
}

template <typename T>
MLIP_INLINE void stream(T* to, Vector<Accumulate<T>> v) {
  const auto elements = rounded(to, v);
#if MLIP_X86
  if constexpr (sizeof elements == 8) {
    _mm_stream_si64(reinterpret_cast<long long*>(to), (long long)elements);
  } else if constexpr (sizeof elements == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)elements);
#if MLIP_VECTOR_BYTES > 16
  } else if constexpr (sizeof elements == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)elements);
#endif
#if MLIP_VECTOR_BYTES > 32
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)elements);
#endif
  }
#else
  std::memcpy(to, &elements, sizeof elements);
#endif
}

MLIP_INLINE void fence() {
#if MLIP_X86
  _mm_sfence();
#endif
}

template <typename T>
MLIP_INLINE Vector<Accumulate<T>> load(const T* from, int64_t count) {
  T padded[LANES<Accumulate<T>>] = {};
  std::memcpy(padded, from, size_t(count) * sizeof(T));
  return load(padded);
}

template <typename T>
MLIP_INLINE void store(T* to, Vector<Accumulate<T>> v, int64_t count) {
  T padded[LANES<Accumulate<T>>];
  store(padded, v);
  std::memcpy(to, padded, size_t(count) * sizeof(T));
}

// The lanes added in pairs: lane i and lane i + half, then halves of halves.
template <typename A>
MLIP_INLINE A sum(Vector<A> v) {
  A lanes[LANES<A>];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = LANES<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Infinities and NaN replaced by 0; v - v is 0 for finite v and NaN otherwise.
template <typename A>
MLIP_INLINE Vector<A> keep_finite(Vector<A> v) {
  const Vector<A> difference = v - v;
  return difference == difference ? v : Vector<A>{};
}

#undef MLIP_INLINE

#elif defined(MLIP_KERNELS) && !defined(MLIP_VECTOR_BYTES)  // compiles the variants of the file MLIP_KERNELS

#if MLIP_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own AVX-512 header
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define MLIP_BF16_DOT 0
#define MLIP_VECTOR_BYTES 16
namespace mlip::cpu::baseline {
#define MLIP_VECTORS
#include "cpu/simd.h"
#undef MLIP_VECTORS
#include MLIP_KERNELS
}  // namespace mlip::cpu::baseline
#undef MLIP_VECTOR_BYTES

#if MLIP_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define MLIP_VECTOR_BYTES 32
namespace mlip::cpu::avx2 {
#define MLIP_VECTORS
#include "cpu/simd.h"
#undef MLIP_VECTORS
#include MLIP_KERNELS
}  // namespace mlip::cpu::avx2
#undef MLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define MLIP_VECTOR_BYTES 64
namespace mlip::cpu::avx512 {
#define MLIP_VECTORS
#include "cpu/simd.h"
#undef MLIP_VECTORS
#include MLIP_KERNELS
}  // namespace mlip::cpu::avx512
#undef MLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if MLIP_X86_BF16 && defined(MLIP_BF16_VARIANT)
#undef MLIP_BF16_DOT
#define MLIP_BF16_DOT 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define MLIP_VECTOR_BYTES 64
namespace mlip::cpu::avx512_bf16 {
#define MLIP_VECTORS
#include "cpu/simd.h"
#undef MLIP_VECTORS
#include MLIP_KERNELS
}  // namespace mlip::cpu::avx512_bf16
#undef MLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#endif  // MLIP_X86
#undef MLIP_BF16_DOT
#undef MLIP_KERNELS
#endif
