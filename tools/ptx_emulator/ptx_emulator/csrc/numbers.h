// Numbers as bits: casts, the narrow float formats, flushing and rounding.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptx {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

enum class Rounding : uint8_t { nearest, zero, down, up, nearest_away };

// A binary float of E exponent and M mantissa bits, laid out as IEEE 754 does.
template <int E, int M>
struct Format {
  static constexpr int bias = (1 << (E - 1)) - 1;
  static constexpr uint32_t infinity = ((1u << E) - 1) << M;
  static constexpr uint32_t sign_bit = 1u << (E + M);
  static constexpr uint32_t nan = sign_bit - 1;  // the canonical NaN of PTX

  static double decode(uint32_t bits) {
    const double sign = bits & sign_bit ? -1.0 : 1.0;
    const int exponent = int(bits >> M & ((1u << E) - 1));
    const double fraction = bits & ((1u << M) - 1);
    if (exponent == (1 << E) - 1) {
      return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - M);
    return sign * std::ldexp(fraction + (1u << M), exponent - bias - M);
  }

  // Rounds once.
  static uint32_t encode(double value, Rounding rounding) {
    if (std::isnan(value)) return nan;
    const uint32_t sign = std::signbit(value) ? sign_bit : 0;
    const double magnitude = std::fabs(value);
    if (magnitude == 0) return sign;
    if (std::isinf(magnitude)) return sign | infinity;
    const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
    const double scaled = std::ldexp(magnitude, M - exponent);
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    const bool odd = std::fmod(whole, 2) != 0;
    const bool away = rest > 0 && ((rounding == Rounding::nearest && (rest > 0.5 || (rest == 0.5 && odd))) ||
                                   (rounding == Rounding::nearest_away && rest >= 0.5) ||
                                   (rounding == Rounding::down && sign) || (rounding == Rounding::up && !sign));
    if (away) whole += 1;
    const double bits = whole + std::ldexp(double(exponent - (1 - bias)), M);
    if (bits < infinity) return sign | uint32_t(bits);
    const bool stays_finite =
        rounding == Rounding::zero || (rounding == Rounding::down && !sign) || (rounding == Rounding::up && sign);
    return sign | (stays_finite ? infinity - 1 : infinity);
  }
};

using HalfFormat = Format<5, 10>;
using BFloatFormat = Format<8, 7>;

inline float bfloat_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return BFloatFormat::nan;
  bits += 0x7fff + (bits >> 16 & 1);
  return uint16_t(bits >> 16);
}

inline float half_to_float(uint16_t bits) {
  static const auto table = [] {
    static float values[1 << 16];
    for (uint32_t i = 0; i < 1 << 16; ++i) values[i] = float(HalfFormat::decode(i));
    return values;
  }();
  return table[bits];
}

inline uint16_t double_to_half(double value) { return uint16_t(HalfFormat::encode(value, Rounding::nearest)); }
inline uint16_t double_to_bfloat(double value) { return uint16_t(BFloatFormat::encode(value, Rounding::nearest)); }

// What the tensor cores read of a float32 operand.
inline float to_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

inline float flush(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

// a + b rounded to odd: rounding the result again, to fewer bits, then rounds the exact sum once.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double of_b = sum - a;
  const double error = (a - (sum - of_b)) + (b - of_b);
  if (error == 0 || (bit_cast<uint64_t>(sum) & 1)) return sum;
  return std::nextafter(sum,
                        error > 0 ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity());
}

// Directed rounding of whatever the processor computes while this lives.
class ProcessorRounding {
 public:
  explicit ProcessorRounding(Rounding rounding) : before_(std::fegetround()) {
    std::fesetround(rounding == Rounding::zero   ? FE_TOWARDZERO
                    : rounding == Rounding::down ? FE_DOWNWARD
                    : rounding == Rounding::up   ? FE_UPWARD
                                                 : FE_TONEAREST);
  }
  ~ProcessorRounding() { std::fesetround(before_); }
  ProcessorRounding(const ProcessorRounding&) = delete;
  ProcessorRounding& operator=(const ProcessorRounding&) = delete;

 private:
  int before_;
};

}  // namespace ptx
