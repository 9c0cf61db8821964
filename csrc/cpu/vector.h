// Vectors of MLIP_VECTOR_BYTES bytes, in the compiler's own vector types: + - * / work lane by lane.
//
// Included once per instruction set by cpu/simd_copies.h, inside a namespace: no include guard, no #include.
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
