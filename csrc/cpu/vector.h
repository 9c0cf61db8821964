// Vectors of MLIP_VECTOR_BYTES bytes, in the compiler's own vector types: + - * / work lane by lane.
//
// Included once per instruction set by cpu/simd_copies.h, inside a namespace: no include guard, no #include.
//
//   Vector<A>               A = float or double: what is computed in, LANES<A> lanes
//   load(T*), store(T*, v)  a whole vector of elements, widened to or rounded from Accumulate<T>
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
  return Vector<A>{} + value;
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

MLIP_INLINE void store(float* to, Vector<float> v) { std::memcpy(to, &v, sizeof v); }
MLIP_INLINE void store(double* to, Vector<double> v) { std::memcpy(to, &v, sizeof v); }

// bfloat16 is the upper half of a float; rounding is to nearest even, and NaN stays NaN.
MLIP_INLINE Vector<float> load(const BFloat16* from) {
  Bits16 half;
  std::memcpy(&half, from, sizeof half);
  const Bits32 bits = __builtin_convertvector(half, Bits32) << 16;
  Vector<float> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

MLIP_INLINE void store(BFloat16* to, Vector<float> v) {
  Bits32 bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 is_nan = (Bits32)(v != v);
  const Bits16 half = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Bits16);
  std::memcpy(to, &half, sizeof half);
}

#if MLIP_VECTOR_BYTES == 64
MLIP_INLINE Vector<float> load(const Half* from) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
MLIP_INLINE void store(Half* to, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif MLIP_VECTOR_BYTES == 32
MLIP_INLINE Vector<float> load(const Half* from) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
MLIP_INLINE void store(Half* to, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// IEEE half precision in integer arithmetic, for processors without conversion instructions.
MLIP_INLINE float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1f;
  const uint32_t mantissa = value.bits & 0x3ff;
  float magnitude;
  if (exponent == 0) {
    magnitude = float(mantissa) * 0x1p-24f;  // zero and subnormal
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    std::memcpy(&magnitude, &bits, sizeof bits);
  }
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  bits |= sign;
  std::memcpy(&magnitude, &bits, sizeof bits);
  return magnitude;
}

MLIP_INLINE Half narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return Half{uint16_t(sign | 0x7e00)};   // NaN
  if (bits >= 0x477ff000) return Half{uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {                                       // subnormal: the addition rounds to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return Half{uint16_t(sign | (bits - 0x3f000000))};
  }
  return Half{uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13))};
}

MLIP_INLINE Vector<float> load(const Half* from) {
  Vector<float> v;
  for (int i = 0; i < LANES<float>; ++i) v[i] = widen(from[i]);
  return v;
}
MLIP_INLINE void store(Half* to, Vector<float> v) {
  for (int i = 0; i < LANES<float>; ++i) to[i] = narrow(v[i]);
}
#endif

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
