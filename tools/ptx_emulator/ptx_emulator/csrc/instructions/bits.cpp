// Logic, shifts, bit fields, permutations, counts.
#include "elements.h"

namespace ptx {
namespace {

struct And {
  template <class T>
  static T apply(T a, T b) {
    return T(a & b);
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return T(a | b);
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return T(a ^ b);
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return T(~a);
  }
  static bool apply(bool a) { return !a; }
};
struct IsZero {
  template <class T>
  static T apply(T a) {
    return T(a == 0);
  }
};

template <class T>
constexpr int width() {
  return int(8 * sizeof(T));
}

struct BitReverse {
  template <class T>
  static T apply(T a) {
    T reversed = 0;
    for (int bit = 0; bit < width<T>(); ++bit) reversed = T(reversed | (a >> bit & 1) << (width<T>() - 1 - bit));
    return reversed;
  }
};

template <class Operation, int count>
void decode_logic(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, count);
  i.execute = i.type == Type::pred ? apply<Predicate, Operation, count> : for_integer<Operation, count>(i.type);
}

template <class Operation, int count>
void decode_bits(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, count);
  i.execute = for_integer<Operation, count>(i.type);
}

// Shifts by the width or more give 0, or the sign.
void shift_left(Warp& warp, const Instruction& i, Mask mask) {
  const uint32_t bits = uint32_t(8 * size_of(i.type));
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  for_lanes(mask, [&](int lane) {
    const uint32_t by = uint32_t(b[lane]);
    to[lane] = by >= bits ? 0 : zero_extend(a[lane] << by, i.type);
  });
}

void shift_right(Warp& warp, const Instruction& i, Mask mask) {
  const uint32_t bits = uint32_t(8 * size_of(i.type));
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  if (is_signed(i.type)) {
    for_lanes(mask, [&](int lane) {
      to[lane] = zero_extend(uint64_t(sign_extend(a[lane], i.type) >> std::min(uint32_t(b[lane]), bits - 1)), i.type);
    });
  } else {
    for_lanes(mask, [&](int lane) {
      const uint32_t by = uint32_t(b[lane]);
      to[lane] = by >= bits ? 0 : zero_extend(a[lane], i.type) >> by;
    });
  }
}

// shf: 64 bits, b above a, shifted; the upper word of a left shift, the lower of a right shift. operation: 1 is right.
void funnel_shift(Warp& warp, const Instruction& i, Mask mask) {
  const bool wrap = i.combine == 1;
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  for_lanes(mask, [&](int lane) {
    const uint32_t by = wrap ? uint32_t(c[lane]) & 31 : std::min(uint32_t(c[lane]), 32u);
    const uint64_t both_words = uint64_t(uint32_t(b[lane])) << 32 | uint32_t(a[lane]);
    to[lane] = i.operation == 1 ? uint32_t(both_words >> by) : uint32_t((both_words << by) >> 32);
  });
}

// bfe: `length` bits of a from `position`, extended with zeros or with the field's sign.
void extract_field(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type);
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  for_lanes(mask, [&](int lane) {
    const int position = int(b[lane] & 255), length = int(c[lane] & 255);
    const uint64_t value = zero_extend(a[lane], i.type);
    const int sign_at = std::min(position + length - 1, bits - 1);
    const bool sign = is_signed(i.type) && length > 0 && (value >> sign_at & 1);
    uint64_t field = position < bits ? value >> position : 0;
    const int taken = std::min(length, std::max(0, bits - position));
    if (taken < 64) field &= (uint64_t(1) << taken) - 1;
    if (sign && taken < 64) field |= ~uint64_t(0) << taken;
    to[lane] = zero_extend(field, i.type);
  });
}

// bfi: the lower `length` bits of a, put into b at `position`.
void insert_field(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type);
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  const uint64_t *const c = warp.source(i, 2), *const d = warp.source(i, 3);
  for_lanes(mask, [&](int lane) {
    const int position = int(c[lane] & 255), length = std::min(int(d[lane] & 255), 64);
    uint64_t field = length == 64 ? ~uint64_t(0) : (uint64_t(1) << length) - 1;
    field = position < bits ? field << position : 0;
    const uint64_t inserted = position < bits ? a[lane] << position : 0;
    to[lane] = zero_extend((b[lane] & ~field) | (inserted & field), i.type);
  });
}

// prmt: each nibble of c picks one of the eight bytes of a and b; its top bit spreads that byte's sign.
void permute_bytes(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  for_lanes(mask, [&](int lane) {
    const uint64_t bytes = uint64_t(uint32_t(b[lane])) << 32 | uint32_t(a[lane]);
    uint32_t result = 0;
    for (int n = 0; n < 4; ++n) {
      const uint32_t pick = uint32_t(c[lane] >> 4 * n);
      uint8_t byte = uint8_t(bytes >> 8 * (pick & 7));
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= uint32_t(byte) << 8 * n;
    }
    to[lane] = result;
  });
}

// lop3: any function of three bits, given by its table of values.
void logic_of_three(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  for_lanes(mask, [&](int lane) {
    uint32_t result = 0;
    for (int entry = 0; entry < 8; ++entry) {
      if (!(i.operation >> entry & 1)) continue;
      const uint32_t x = uint32_t(a[lane]), y = uint32_t(b[lane]), z = uint32_t(c[lane]);
      result |= (entry & 4 ? x : ~x) & (entry & 2 ? y : ~y) & (entry & 1 ? z : ~z);
    }
    to[lane] = result;
  });
}

void count_ones(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = uint64_t(__builtin_popcountll(zero_extend(a[lane], i.type))); });
}

void count_leading_zeros(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type);
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    const uint64_t value = zero_extend(a[lane], i.type);
    to[lane] = uint64_t(value ? __builtin_clzll(value) - (64 - bits) : bits);
  });
}

// bfind: the position of the highest bit that differs from the sign. operation 1: how far to shift it to the top.
void find_highest_bit(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type);
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    uint64_t value = zero_extend(a[lane], i.type);
    if (is_signed(i.type) && (value >> (bits - 1) & 1)) value = zero_extend(~value, i.type);
    const int position = value ? 63 - __builtin_clzll(value) : -1;
    to[lane] = uint32_t(i.operation == 1 && position >= 0 ? bits - 1 - position : position);
  });
}

template <Execute execute, int count>
void decode_with(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, count);
  i.execute = execute;
}

void decode_funnel_shift(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  i.operation = mnemonic.has("r");
  i.combine = mnemonic.has("wrap");
  decode_with<funnel_shift, 3>(mnemonic, operands, i);
}

void decode_permute(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (mnemonic.one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})) unsupported(mnemonic);
  decode_with<permute_bytes, 3>(mnemonic, operands, i);
}

void decode_logic_of_three(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (mnemonic.one_of({"and", "or", "xor"})) unsupported(mnemonic);  // with a predicate
  operands.destination_and_sources(i, 3);
  operands.expect(",");
  i.operation = operands.immediate();
  i.execute = logic_of_three;
}

void decode_find(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  i.operation = mnemonic.has("shiftamt");
  decode_with<find_highest_bit, 1>(mnemonic, operands, i);
}

}  // namespace

void add_bits(InstructionSet& set) {
  const std::vector<Type> logic = both(BITS, {Type::pred}), words = {Type::b32, Type::b64};
  const std::vector<Type> wide_integers = {Type::u32, Type::u64, Type::s32, Type::s64};
  set.add("and", logic, decode_logic<And, 2>);
  set.add("or", logic, decode_logic<Or, 2>);
  set.add("xor", logic, decode_logic<Xor, 2>);
  set.add("not", logic, decode_logic<Not, 1>);
  set.add("cnot", BITS, decode_bits<IsZero, 1>);
  set.add("shl", BITS, decode_with<shift_left, 2>);
  set.add("shr", both(BITS, INTEGERS), decode_with<shift_right, 2>);
  set.add("shf", {Type::b32}, decode_funnel_shift);
  set.add("bfe", wide_integers, decode_with<extract_field, 3>);
  set.add("bfi", words, decode_with<insert_field, 4>);
  set.add("prmt", {Type::b32}, decode_permute);
  set.add("lop3", {Type::b32}, decode_logic_of_three);
  set.add("popc", words, decode_with<count_ones, 1>);
  set.add("clz", words, decode_with<count_leading_zeros, 1>);
  set.add("brev", words, decode_bits<BitReverse, 1>);
  set.add("bfind", wide_integers, decode_find);
}

}  // namespace ptx
