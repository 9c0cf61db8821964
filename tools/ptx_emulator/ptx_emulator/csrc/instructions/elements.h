// How the bits of a register become a C++ value and back, and how an operation is applied to all lanes.
//
// An element type has a `Value`, the number of `parts` that a register holds, and load and store of one part.
#pragma once
#include <algorithm>
#include <limits>
#include <string>

#include "../block.h"
#include "../instruction_set.h"
#include "../parser.h"

namespace ptx {

template <class T>
struct Integer {
  using Value = T;
  static constexpr int parts = 1;
  static T load(uint64_t bits, int) { return T(bits); }
  static uint64_t store(T value, int) { return uint64_t(std::make_unsigned_t<T>(value)); }
};

struct Predicate {
  using Value = bool;
  static constexpr int parts = 1;
  static bool load(uint64_t bits, int) { return bits & 1; }
  static uint64_t store(bool value, int) { return value; }
};

struct Float32 {
  using Value = float;
  static constexpr int parts = 1;
  static float load(uint64_t bits, int) { return bit_cast<float>(uint32_t(bits)); }
  static uint64_t store(float value, int) { return bit_cast<uint32_t>(value); }
};

// Subnormal operands and results are zeros.
struct FlushedFloat32 : Float32 {
  static float load(uint64_t bits, int part) { return flush(Float32::load(bits, part)); }
  static uint64_t store(float value, int part) { return Float32::store(flush(value), part); }
};

struct Float64 {
  using Value = double;
  static constexpr int parts = 1;
  static double load(uint64_t bits, int) { return bit_cast<double>(bits); }
  static uint64_t store(double value, int) { return bit_cast<uint64_t>(value); }
};

constexpr double SMALLEST_NORMAL_HALF = 1.0 / (1 << 14);

// Half precision is computed in double, where sums and products are exact enough to be rounded once more.
template <int count>
struct Half {
  using Value = double;
  static constexpr int parts = count;
  static double load(uint64_t bits, int part) { return half_to_float(uint16_t(bits >> 16 * part)); }
  static uint64_t store(double value, int part) { return uint64_t(double_to_half(value)) << 16 * part; }
};

template <int count>
struct FlushedHalf : Half<count> {
  static double load(uint64_t bits, int part) {
    const double value = Half<count>::load(bits, part);
    return std::fabs(value) < SMALLEST_NORMAL_HALF ? std::copysign(0.0, value) : value;
  }
  static uint64_t store(double value, int part) {
    const uint64_t bits = Half<count>::store(value, part);
    const bool subnormal = (bits >> 16 * part & 0x7c00) == 0;
    return subnormal ? bits & uint64_t(0x8000) << 16 * part : bits;
  }
};

template <int count>
struct BFloat {
  using Value = double;
  static constexpr int parts = count;
  static double load(uint64_t bits, int part) { return bfloat_to_float(uint16_t(bits >> 16 * part)); }
  static uint64_t store(double value, int part) { return uint64_t(double_to_bfloat(value)) << 16 * part; }
};

// .sat: results are clamped to [0, 1], NaN becomes 0.
template <class Element>
struct Saturated : Element {
  static uint64_t store(typename Element::Value value, int part) {
    using Value = typename Element::Value;
    return Element::store(value > Value(1) ? Value(1) : value > Value(0) ? value : Value(0), part);
  }
};

// .relu: negative results become 0, NaN stays.
template <class Element>
struct Rectified : Element {
  static uint64_t store(typename Element::Value value, int part) {
    using Value = typename Element::Value;
    return Element::store(value < Value(0) || (value == Value(0)) ? Value(0) : value, part);
  }
};

// destination = Operation(sources...), for 1, 2 or 3 sources.
template <class Element, class Operation, int count>
void apply(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  const uint64_t* const b = count > 1 ? warp.source(i, 1) : a;
  const uint64_t* const c = count > 2 ? warp.source(i, 2) : a;
  for_lanes(mask, [&](int lane) {
    uint64_t result = 0;
    for (int part = 0; part < Element::parts; ++part) {
      const auto x = Element::load(a[lane], part);
      if constexpr (count == 1) {
        result |= Element::store(Operation::apply(x), part);
      } else if constexpr (count == 2) {
        result |= Element::store(Operation::apply(x, Element::load(b[lane], part)), part);
      } else {
        result |= Element::store(Operation::apply(x, Element::load(b[lane], part), Element::load(c[lane], part)), part);
      }
    }
    to[lane] = result;
  });
}

[[noreturn]] inline void unsupported(const Mnemonic& mnemonic) {
  throw UnsupportedError("unsupported form of " + mnemonic.base + ": " + mnemonic.text);
}

template <class Operation, int count>
Execute for_integer(Type type) {
  switch (type) {
    case Type::u16:
    case Type::b16:
      return apply<Integer<uint16_t>, Operation, count>;
    case Type::u32:
    case Type::b32:
      return apply<Integer<uint32_t>, Operation, count>;
    case Type::u64:
    case Type::b64:
      return apply<Integer<uint64_t>, Operation, count>;
    case Type::s16:
      return apply<Integer<int16_t>, Operation, count>;
    case Type::s32:
      return apply<Integer<int32_t>, Operation, count>;
    case Type::s64:
      return apply<Integer<int64_t>, Operation, count>;
    default:
      return nullptr;
  }
}

// Runs `inner` under the rounding that the instruction names.
inline void with_rounding(Warp& warp, const Instruction& i, Mask mask) {
  const ProcessorRounding rounding(i.rounding);
  i.inner(warp, i, mask);
}

// The form of an operation that .relu, .sat and .ftz choose.
template <class Element, class Flushed, class Operation, int count>
Execute with_modifiers(const Instruction& i) {
  if (i.flush) {
    return i.relu       ? apply<Rectified<Flushed>, Operation, count>
           : i.saturate ? apply<Saturated<Flushed>, Operation, count>
                        : apply<Flushed, Operation, count>;
  }
  return i.relu       ? apply<Rectified<Element>, Operation, count>
         : i.saturate ? apply<Saturated<Element>, Operation, count>
                      : apply<Element, Operation, count>;
}

// The float form of an operation, with its modifiers.
template <class Operation, int count>
Execute for_float(const Mnemonic& mnemonic, Instruction& i) {
  Execute chosen = nullptr;
  switch (i.type) {
    case Type::f32:
      chosen = i.flush && i.saturate ? apply<Saturated<FlushedFloat32>, Operation, count>
               : i.flush             ? apply<FlushedFloat32, Operation, count>
               : i.saturate          ? apply<Saturated<Float32>, Operation, count>
                                     : apply<Float32, Operation, count>;
      break;
    case Type::f64:
      chosen = apply<Float64, Operation, count>;
      break;
    case Type::f16:
      chosen = with_modifiers<Half<1>, FlushedHalf<1>, Operation, count>(i);
      break;
    case Type::f16x2:
      chosen = with_modifiers<Half<2>, FlushedHalf<2>, Operation, count>(i);
      break;
    case Type::bf16:
      chosen = i.relu ? apply<Rectified<BFloat<1>>, Operation, count> : apply<BFloat<1>, Operation, count>;
      break;
    case Type::bf16x2:
      chosen = i.relu ? apply<Rectified<BFloat<2>>, Operation, count> : apply<BFloat<2>, Operation, count>;
      break;
    default:
      unsupported(mnemonic);
  }
  if (i.rounding == Rounding::nearest) return chosen;
  if (i.type != Type::f32 && i.type != Type::f64) unsupported(mnemonic);
  i.inner = chosen;
  return with_rounding;
}

inline const std::vector<Type> INTEGERS = {Type::u16, Type::u32, Type::u64, Type::s16, Type::s32, Type::s64};
inline const std::vector<Type> BITS = {Type::b16, Type::b32, Type::b64};
inline const std::vector<Type> FLOATS = {Type::f16, Type::bf16, Type::f32, Type::f64, Type::f16x2, Type::bf16x2};

inline std::vector<Type> both(std::vector<Type> a, const std::vector<Type>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace ptx
