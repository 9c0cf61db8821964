// add, sub, mul, mad, fma, div, rem, min, max, abs, neg, sad, dp4a: integer and float.
#include "elements.h"

namespace ptx {
namespace {

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return T(a + b);
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return T(a - b);
  }
};
struct Multiply {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (sizeof(T) == 2) return T(int64_t(a) * int64_t(b));
    return T(a * b);
  }
};
struct MultiplyAdd {
  template <class T>
  static T apply(T a, T b, T c) {
    return T(Multiply::apply(a, b) + c);
  }
};

// Division by zero gives all ones, its remainder the dividend, as NVIDIA's hardware does; PTX leaves both open.
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::numeric_limits<T>::is_integer) {
      if (b == 0) return T(~T(0));
      if (std::numeric_limits<T>::is_signed && b == T(-1)) return T(0 - a);
    }
    return T(a / b);
  }
};
struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::numeric_limits<T>::is_signed && b == T(-1)) return 0;
    return T(a % b);
  }
};

template <class T>
T smaller_or_larger(T a, T b, bool larger, bool propagate_nan) {
  if constexpr (!std::numeric_limits<T>::is_integer) {
    if (std::isnan(a) || std::isnan(b)) {
      return propagate_nan ? std::numeric_limits<T>::quiet_NaN() : std::isnan(a) ? b : a;
    }
    if (a == b) return std::signbit(a) == larger ? b : a;  // +0 is larger than -0
  }
  return (a < b) == larger ? b : a;
}
template <bool larger, bool propagate_nan>
struct Extreme {
  template <class T>
  static T apply(T a, T b) {
    return smaller_or_larger(a, b, larger, propagate_nan);
  }
  template <class T>
  static T apply(T a, T b, T c) {
    return apply(apply(a, b), c);
  }
};

struct Absolute {
  template <class T>
  static T apply(T a) {
    if constexpr (std::numeric_limits<T>::is_integer) return T(a < 0 ? 0 - a : a);
    return std::fabs(a);
  }
};
struct Negate {
  template <class T>
  static T apply(T a) {
    if constexpr (std::numeric_limits<T>::is_integer) return T(0 - a);
    return -a;
  }
};
struct SumOfDifference {
  template <class T>
  static T apply(T a, T b, T c) {
    return T(c + (a > b ? a - b : b - a));
  }
};

// f32 and f64 have a processor instruction; half precision in double is exact, bfloat16 is not and rounds to odd.
struct FusedMultiplyAdd {
  static float apply(float a, float b, float c) { return std::fma(a, b, c); }
  static double apply(double a, double b, double c) { return std::fma(a, b, c); }
};
struct FusedMultiplyAddToOdd {
  static double apply(double a, double b, double c) { return add_to_odd(a * b, c); }
};

// The upper half of a product of twice the width.
template <class T>
T upper_half(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::numeric_limits<T>::is_signed, __int128, unsigned __int128>;
    return T((Wide(a) * Wide(b)) >> 64);
  } else {
    using Wide = std::conditional_t<std::numeric_limits<T>::is_signed, int64_t, uint64_t>;
    return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
  }
}
struct MultiplyHigh {
  template <class T>
  static T apply(T a, T b) {
    return upper_half(a, b);
  }
};
struct MultiplyAddHigh {
  template <class T>
  static T apply(T a, T b, T c) {
    return T(upper_half(a, b) + c);
  }
};

// mul.wide, mad.wide: the result is twice as wide as the factors.
void multiply_wide(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  const uint64_t* const c = i.sources.size() > 2 ? warp.source(i, 2) : nullptr;
  for_lanes(mask, [&](int lane) {
    const uint64_t product = uint64_t(as_integer(a[lane], i.type) * as_integer(b[lane], i.type));
    const uint64_t sum = product + (c ? c[lane] : 0);
    to[lane] = size_of(i.type) == 2 ? uint32_t(sum) : sum;
  });
}

// mul24, mad24: the lower 24 bits of the factors, the lower 32 bits of the product.
void multiply_24(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  const uint64_t* const c = i.sources.size() > 2 ? warp.source(i, 2) : nullptr;
  const auto narrow = [&](uint64_t bits) {
    return is_signed(i.type) ? int64_t(int32_t(uint32_t(bits) << 8) >> 8) : int64_t(bits & 0xffffff);
  };
  for_lanes(mask,
            [&](int lane) { to[lane] = uint32_t(uint64_t(narrow(a[lane]) * narrow(b[lane])) + (c ? c[lane] : 0)); });
}

// dp4a: the dot product of four bytes, added to c.
void dot_bytes(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  const auto byte = [](uint64_t bits, int n, Type type) {
    return type == Type::s32 ? int64_t(int8_t(bits >> 8 * n)) : int64_t(uint8_t(bits >> 8 * n));
  };
  for_lanes(mask, [&](int lane) {
    int64_t sum = int64_t(c[lane]);
    for (int n = 0; n < 4; ++n) sum += byte(a[lane], n, i.type) * byte(b[lane], n, i.source_type);
    to[lane] = uint32_t(sum);
  });
}

// abs and neg of floats change the sign bit alone, NaN included.
template <bool negate>
void change_sign(Warp& warp, const Instruction& i, Mask mask) {
  const uint64_t sign = is_packed(i.type) ? 0x80008000u : uint64_t(1) << (8 * size_of(i.type) - 1);
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = zero_extend(negate ? a[lane] ^ sign : a[lane] & ~sign, i.type); });
}

template <class Operation, int count>
void decode(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, count);
  if (is_float(i.type)) {
    i.execute = for_float<Operation, count>(mnemonic, i);
  } else {
    if (i.saturate) unsupported(mnemonic);
    i.execute = for_integer<Operation, count>(i.type);
  }
}

template <class Operation, int count>
void decode_integer(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (i.saturate) unsupported(mnemonic);
  operands.destination_and_sources(i, count);
  i.execute = for_integer<Operation, count>(i.type);
}

void decode_multiply(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (mnemonic.has("wide")) {
    operands.destination_and_sources(i, 2);
    i.execute = multiply_wide;
  } else if (mnemonic.has("hi")) {
    decode_integer<MultiplyHigh, 2>(mnemonic, operands, i);
  } else {
    decode<Multiply, 2>(mnemonic, operands, i);
  }
}

void decode_fused(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 3);
  const bool bfloat = i.type == Type::bf16 || i.type == Type::bf16x2;
  i.execute = bfloat ? for_float<FusedMultiplyAddToOdd, 3>(mnemonic, i) : for_float<FusedMultiplyAdd, 3>(mnemonic, i);
}

void decode_multiply_add(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (is_float(i.type)) return decode_fused(mnemonic, operands, i);
  if (mnemonic.has("wide")) {
    operands.destination_and_sources(i, 3);
    i.execute = multiply_wide;
  } else if (mnemonic.has("hi")) {
    decode_integer<MultiplyAddHigh, 3>(mnemonic, operands, i);
  } else {
    decode_integer<MultiplyAdd, 3>(mnemonic, operands, i);
  }
}

template <int count>
void decode_24(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (!mnemonic.has("lo")) unsupported(mnemonic);
  operands.destination_and_sources(i, count);
  i.execute = multiply_24;
}

template <bool larger, int count>
Execute extreme(const Mnemonic& mnemonic, Instruction& i) {
  if (!is_float(i.type) && i.relu) unsupported(mnemonic);
  if (!is_float(i.type)) return for_integer<Extreme<larger, false>, count>(i.type);
  return i.propagate_nan ? for_float<Extreme<larger, true>, count>(mnemonic, i)
                         : for_float<Extreme<larger, false>, count>(mnemonic, i);
}

template <bool larger>
void decode_extreme(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 2);
  const bool three = operands.accept(",");
  if (three) i.sources.push_back(operands.row());
  i.execute = three ? extreme<larger, 3>(mnemonic, i) : extreme<larger, 2>(mnemonic, i);
}

template <bool negate>
void decode_sign(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 1);
  i.execute = change_sign<negate>;
  if (!is_float(i.type)) i.execute = negate ? for_integer<Negate, 1>(i.type) : for_integer<Absolute, 1>(i.type);
}

template <class Operation>
void decode_float_sign_ftz(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (!is_float(i.type) || !i.flush) return decode_sign<std::is_same_v<Operation, Negate>>(mnemonic, operands, i);
  operands.destination_and_sources(i, 1);
  i.execute = for_float<Operation, 1>(mnemonic, i);
}

void decode_dot_bytes(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 3);
  i.execute = dot_bytes;
}

}  // namespace

void add_arithmetic(InstructionSet& set) {
  const std::vector<Type> numbers = both(INTEGERS, FLOATS),
                          signed_numbers = both({Type::s16, Type::s32, Type::s64}, FLOATS);
  set.add("add", numbers, decode<Add, 2>);
  set.add("sub", numbers, decode<Subtract, 2>);
  set.add("mul", numbers, decode_multiply);
  set.add("mad", both(INTEGERS, {Type::f32, Type::f64}), decode_multiply_add);
  set.add("fma", FLOATS, decode_fused);
  set.add("mul24", {Type::u32, Type::s32}, decode_24<2>);
  set.add("mad24", {Type::u32, Type::s32}, decode_24<3>);
  set.add("div", both(INTEGERS, {Type::f32, Type::f64}), decode<Divide, 2>);
  set.add("rem", INTEGERS, decode_integer<Remainder, 2>);
  set.add("min", numbers, decode_extreme<false>);
  set.add("max", numbers, decode_extreme<true>);
  set.add("abs", signed_numbers, decode_float_sign_ftz<Absolute>);
  set.add("neg", signed_numbers, decode_float_sign_ftz<Negate>);
  set.add("sad", INTEGERS, decode_integer<SumOfDifference, 3>);
  set.add("dp4a", {Type::u32, Type::s32}, decode_dot_bytes);
}

}  // namespace ptx
