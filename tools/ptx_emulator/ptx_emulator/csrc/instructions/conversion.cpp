// cvt between every pair of integer and float types, and to packed halves.
#include "elements.h"

namespace ptx {
namespace {

bool is_half(Type type) { return type == Type::f16; }
bool is_bfloat(Type type) { return type == Type::bf16; }

double load_float(uint64_t bits, Type type) {
  return type == Type::f64 ? bit_cast<double>(bits)
         : is_half(type)   ? half_to_float(uint16_t(bits))
         : is_bfloat(type) ? bfloat_to_float(uint16_t(bits))
                           : bit_cast<float>(uint32_t(bits));
}

double to_integral(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::zero:
      return std::trunc(value);
    case Rounding::down:
      return std::floor(value);
    case Rounding::up:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

float to_float(double value, Rounding rounding) {
  const ProcessorRounding scope(rounding);
  volatile double source = value;  // keeps the conversion inside the scope
  return float(source);
}

uint64_t store_float(double value, Type type, Rounding rounding) {
  switch (type) {
    case Type::f64:
      return bit_cast<uint64_t>(value);
    case Type::f16:
      return HalfFormat::encode(value, rounding);
    case Type::bf16:
      return BFloatFormat::encode(value, rounding);
    default:
      return bit_cast<uint32_t>(rounding == Rounding::nearest ? float(value) : to_float(value, rounding));
  }
}

double clamp(const Instruction& i, double value) {
  if (i.saturate) return value > 1 ? 1 : value > 0 ? value : 0;
  if (i.relu && value <= 0) return 0;
  return value;
}

void float_to_float(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    double value = load_float(a[lane], i.source_type);
    if (i.flush && i.source_type == Type::f32) value = flush(float(value));
    if (i.to_integer) value = to_integral(value, i.rounding);
    uint64_t result = store_float(clamp(i, value), i.type, i.to_integer ? Rounding::nearest : i.rounding);
    if (i.flush && i.type == Type::f32) result = bit_cast<uint32_t>(flush(bit_cast<float>(uint32_t(result))));
    to[lane] = result;
  });
}

// The common cases, quickly.
void float_to_bfloat_nearest(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = float_to_bfloat(bit_cast<float>(uint32_t(a[lane]))); });
}
void bfloat_to_float_exactly(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = uint64_t(uint16_t(a[lane])) << 16; });
}

// Out of range is clamped; NaN becomes 0, or, if either type has 64 bits, the number with the top bit alone.
void float_to_integer(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type);
  const double low = is_signed(i.type) ? -std::ldexp(1.0, bits - 1) : 0;
  const double above = std::ldexp(1.0, is_signed(i.type) ? bits - 1 : bits);
  const uint64_t highest = is_signed(i.type) ? (uint64_t(1) << (bits - 1)) - 1 : zero_extend(~uint64_t(0), i.type);
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    double value = load_float(a[lane], i.source_type);
    if (i.flush && i.source_type == Type::f32) value = flush(float(value));
    if (std::isnan(value)) {
      to[lane] = bits == 64 || i.source_type == Type::f64 ? uint64_t(1) << (bits - 1) : 0;
      return;
    }
    value = std::max(to_integral(value, i.rounding), low);
    to[lane] = value >= above      ? highest
               : is_signed(i.type) ? zero_extend(uint64_t(int64_t(value)), i.type)
                                   : uint64_t(value);
  });
}

// A 64-bit integer does not fit into a double: it is rounded to float directly.
void integer_to_float(Warp& warp, const Instruction& i, Mask mask) {
  const ProcessorRounding scope(i.rounding);
  const bool is_negative_possible = is_signed(i.source_type);
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    volatile int64_t value = as_integer(a[lane], i.source_type);
    const uint64_t unsigned_value = uint64_t(value);
    if (i.type == Type::f64) {
      to[lane] = bit_cast<uint64_t>(is_negative_possible ? double(value) : double(unsigned_value));
    } else if (i.type == Type::f32) {
      const float converted = is_negative_possible ? float(value) : float(unsigned_value);
      to[lane] = bit_cast<uint32_t>(i.saturate ? float(clamp(i, converted)) : converted);
    } else {
      // Ties of half precision have at most 12 bits; what rounding to odd keeps below them decides.
      const uint64_t magnitude = is_negative_possible && value < 0 ? uint64_t(0) - unsigned_value : unsigned_value;
      const uint64_t shortened = magnitude >> 53 ? (magnitude >> 11 << 11) | (magnitude & 2047 ? 2048 : 0) : magnitude;
      const double odd = double(shortened) * (is_negative_possible && value < 0 ? -1 : 1);
      to[lane] = store_float(odd, i.type, i.rounding);
    }
  });
}

void integer_to_integer(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type);
  using Wide = __int128;
  const Wide low = is_signed(i.type) ? -(Wide(1) << (bits - 1)) : 0;
  const Wide high = (Wide(1) << (is_signed(i.type) ? bits - 1 : bits)) - 1;
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    const int64_t loaded = as_integer(a[lane], i.source_type);
    Wide value = is_signed(i.source_type) ? Wide(loaded) : Wide(uint64_t(loaded));
    if (i.saturate) value = std::min(high, std::max(low, value));
    // A result narrower than 32 bits is extended to the register, as its type says.
    to[lane] = bits >= 32          ? zero_extend(uint64_t(value), i.type)
               : is_signed(i.type) ? uint32_t(sign_extend(uint64_t(value), i.type))
                                   : zero_extend(uint64_t(value), i.type);
  });
}

// cvt.bf16x2.f32 d, a, b: a above b.
void to_packed(Warp& warp, const Instruction& i, Mask mask) {
  const Type part = i.type == Type::f16x2 ? Type::f16 : Type::bf16;
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  for_lanes(mask, [&](int lane) {
    const uint64_t high = store_float(clamp(i, load_float(a[lane], Type::f32)), part, i.rounding);
    const uint64_t low = store_float(clamp(i, load_float(b[lane], Type::f32)), part, i.rounding);
    to[lane] = high << 16 | low;
  });
}

void to_tf32(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    const double value = clamp(i, bit_cast<float>(uint32_t(a[lane])));
    to[lane] = std::isnan(value) ? 0x7fffffff : uint64_t(Format<8, 10>::encode(value, i.rounding)) << 13;
  });
}

void decode_convert(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (mnemonic.types.size() != 2 || mnemonic.has("pack") || mnemonic.has("satfinite")) unsupported(mnemonic);
  if (is_packed(i.type)) {
    if (i.source_type != Type::f32) unsupported(mnemonic);
    operands.destination_and_sources(i, 2);
    i.execute = to_packed;
    return;
  }
  operands.destination_and_sources(i, 1);
  if (is_packed(i.source_type) || i.source_type == Type::tf32) unsupported(mnemonic);
  if (i.type == Type::tf32) {
    if (i.source_type != Type::f32) unsupported(mnemonic);
    i.execute = to_tf32;
  } else if (is_float(i.type) && is_float(i.source_type)) {
    const bool plain = i.rounding == Rounding::nearest && !i.flush && !i.relu && !i.saturate && !i.to_integer;
    const bool narrows = i.type == Type::bf16 && i.source_type == Type::f32;
    const bool widens = i.type == Type::f32 && i.source_type == Type::bf16;
    i.execute = plain && narrows ? float_to_bfloat_nearest : plain && widens ? bfloat_to_float_exactly : float_to_float;
  } else if (is_float(i.type)) {
    i.execute = integer_to_float;
  } else {
    i.execute = is_float(i.source_type) ? float_to_integer : integer_to_integer;
  }
}

}  // namespace

void add_conversion(InstructionSet& set) {
  const std::vector<Type> bytes = {Type::u8, Type::s8};
  set.add("cvt", both(both(INTEGERS, bytes), both(FLOATS, {Type::tf32})), decode_convert);
}

}  // namespace ptx
