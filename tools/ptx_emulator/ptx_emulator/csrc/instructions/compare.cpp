// setp, set, selp, slct, testp, copysign.
#include "elements.h"

namespace ptx {
namespace {

enum Comparison { EQ, NE, LT, LE, GT, GE, LO, LS, HI, HS, EQU, NEU, LTU, LEU, GTU, GEU, NUM, IS_NAN };
const std::vector<std::string> COMPARISONS = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                              "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
enum Combination { ALONE, AND, OR, XOR };

// Unordered comparisons (…u) hold if an operand is NaN. On integers, lo, ls, hi and hs are the unsigned lt, le, gt, ge.
template <class T>
bool compare(int comparison, T a, T b) {
  bool unordered = false;
  if constexpr (!std::numeric_limits<T>::is_integer) unordered = std::isnan(a) || std::isnan(b);
  switch (comparison) {
    case EQ:
      return !unordered && a == b;
    case NE:
      return !unordered && a != b;
    case LT:
    case LO:
      return a < b;
    case LE:
    case LS:
      return a <= b;
    case GT:
    case HI:
      return a > b;
    case GE:
    case HS:
      return a >= b;
    case EQU:
      return unordered || a == b;
    case NEU:
      return unordered || a != b;
    case LTU:
      return unordered || a < b;
    case LEU:
      return unordered || a <= b;
    case GTU:
      return unordered || a > b;
    case GEU:
      return unordered || a >= b;
    case NUM:
      return !unordered;
    default:
      return unordered;
  }
}

bool combine(int how, bool a, bool b) { return how == AND ? a && b : how == OR ? a || b : how == XOR ? a != b : a; }

template <class Element>
void set_predicate(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  uint64_t* const complement = i.destinations.size() > 1 ? warp.destination(i, 1) : nullptr;
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  const uint64_t* const c = i.combine ? warp.source(i, 2) : nullptr;
  for_lanes(mask, [&](int lane) {
    const bool holds = compare(i.operation, Element::load(a[lane], 0), Element::load(b[lane], 0));
    const bool other = c && bool(c[lane] & 1) != i.negate_predicate;
    to[lane] = combine(i.combine, holds, other);
    if (complement) complement[lane] = combine(i.combine, !holds, other);
  });
}

// set: true is 1.0 in a float type, all ones in an integer type.
template <class Element>
void set_value(Warp& warp, const Instruction& i, Mask mask) {
  const bool bfloat = i.type == Type::bf16 || i.type == Type::bf16x2,
             half = i.type == Type::f16 || i.type == Type::f16x2;
  const uint64_t one = i.type == Type::f32 ? 0x3f800000 : bfloat ? 0x3f80 : half ? 0x3c00 : 0xffffffff;
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  const uint64_t* const c = i.combine ? warp.source(i, 2) : nullptr;
  for_lanes(mask, [&](int lane) {
    const bool other = c && bool(c[lane] & 1) != i.negate_predicate;
    uint64_t result = 0;
    for (int part = 0; part < Element::parts; ++part) {
      const bool holds = compare(i.operation, Element::load(a[lane], part), Element::load(b[lane], part));
      if (combine(i.combine, holds, other)) result |= one << 16 * part;
    }
    to[lane] = result;
  });
}

template <template <class> class Action>
Execute by_type(const Mnemonic& mnemonic, Type type, bool flush) {
  switch (type) {
    case Type::b16:
    case Type::u16:
      return Action<Integer<uint16_t>>::run;
    case Type::b32:
    case Type::u32:
      return Action<Integer<uint32_t>>::run;
    case Type::b64:
    case Type::u64:
      return Action<Integer<uint64_t>>::run;
    case Type::s16:
      return Action<Integer<int16_t>>::run;
    case Type::s32:
      return Action<Integer<int32_t>>::run;
    case Type::s64:
      return Action<Integer<int64_t>>::run;
    case Type::f16:
      return flush ? Action<FlushedHalf<1>>::run : Action<Half<1>>::run;
    case Type::bf16:
      return Action<BFloat<1>>::run;
    case Type::f32:
      return flush ? Action<FlushedFloat32>::run : Action<Float32>::run;
    case Type::f64:
      return Action<Float64>::run;
    default:
      unsupported(mnemonic);
  }
}
template <class Element>
struct SetPredicate {
  static void run(Warp& warp, const Instruction& i, Mask mask) { set_predicate<Element>(warp, i, mask); }
};
template <class Element>
struct SetValue {
  static void run(Warp& warp, const Instruction& i, Mask mask) { set_value<Element>(warp, i, mask); }
};

// setp of packed halves gives one predicate for each.
template <class Element>
void set_two_predicates(Warp& warp, const Instruction& i, Mask mask) {
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  for (int part = 0; part < 2; ++part) {
    uint64_t* const to = warp.destination(i, size_t(part));
    for_lanes(mask, [&](int lane) {
      to[lane] = compare(i.operation, Element::load(a[lane], part), Element::load(b[lane], part));
    });
  }
}

void read_comparison(const Mnemonic& mnemonic, Instruction& i) {
  const auto comparison = mnemonic.one_of(COMPARISONS);
  if (!comparison) unsupported(mnemonic);
  i.operation = *comparison;
  i.combine = mnemonic.has("and") ? AND : mnemonic.has("or") ? OR : mnemonic.has("xor") ? XOR : ALONE;
}

void read_sources(Operands& operands, Instruction& i) {
  operands.expect(",");
  operands.immediates_are(i.source_type);
  operands.sources(i, 2);
  if (i.combine == ALONE) return;
  operands.expect(",");
  i.negate_predicate = operands.accept("!");
  i.sources.push_back(operands.row());
}

void decode_set_predicate(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  read_comparison(mnemonic, i);
  i.destinations.push_back(operands.row());
  if (operands.accept("|")) i.destinations.push_back(operands.row());
  read_sources(operands, i);
  if (is_packed(i.type)) {
    if (i.combine != ALONE || i.destinations.size() != 2) unsupported(mnemonic);
    i.execute = i.type == Type::bf16x2 ? set_two_predicates<BFloat<2>>
                : i.flush              ? set_two_predicates<FlushedHalf<2>>
                                       : set_two_predicates<Half<2>>;
  } else {
    i.execute = by_type<SetPredicate>(mnemonic, i.type, i.flush);
  }
}

void decode_set(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  read_comparison(mnemonic, i);
  i.destinations.push_back(operands.row());
  read_sources(operands, i);
  if (is_packed(i.source_type)) {
    if (!is_packed(i.type)) unsupported(mnemonic);
    i.execute = i.source_type == Type::bf16x2 ? set_value<BFloat<2>>
                : i.flush                     ? set_value<FlushedHalf<2>>
                                              : set_value<Half<2>>;
  } else {
    i.execute = by_type<SetValue>(mnemonic, i.source_type, i.flush);
  }
}

void select(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  for_lanes(mask, [&](int lane) { to[lane] = zero_extend(c[lane] & 1 ? a[lane] : b[lane], i.type); });
}

void decode_select(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 3);
  i.execute = select;
}

// slct: a where c >= 0, else b; NaN counts as negative, -0 as 0.
void select_by_sign(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1), *const c = warp.source(i, 2);
  for_lanes(mask, [&](int lane) {
    float value = bit_cast<float>(uint32_t(c[lane]));
    if (i.flush) value = flush(value);
    const bool first = i.source_type == Type::f32 ? value >= 0 : int32_t(c[lane]) >= 0;
    to[lane] = zero_extend(first ? a[lane] : b[lane], i.type);
  });
}

void decode_select_by_sign(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (i.source_type != Type::f32 && i.source_type != Type::s32) unsupported(mnemonic);
  operands.destination_and_sources(i, 3);
  i.execute = select_by_sign;
}

enum { FINITE, INFINITE, NUMBER, NOT_A_NUMBER, NORMAL, SUBNORMAL };

// Zeros count as normal.
template <class Element>
void test_property(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    const auto value = Element::load(a[lane], 0);
    const int kind = std::fpclassify(value);
    const bool normal = kind == FP_NORMAL || kind == FP_ZERO;
    const bool holds[] = {std::isfinite(value), std::isinf(value), !std::isnan(value), std::isnan(value), normal,
                          kind == FP_SUBNORMAL};
    to[lane] = holds[i.operation];
  });
}

void decode_test(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto property = mnemonic.one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  if (!property) unsupported(mnemonic);
  i.operation = *property;
  operands.destination_and_sources(i, 1);
  i.execute = i.type == Type::f64 ? test_property<Float64> : test_property<Float32>;
}

// copysign: the sign of a, the magnitude of b.
void copy_sign(Warp& warp, const Instruction& i, Mask mask) {
  const uint64_t sign = uint64_t(1) << (8 * size_of(i.type) - 1);
  uint64_t* const to = warp.destination(i);
  const uint64_t *const a = warp.source(i, 0), *const b = warp.source(i, 1);
  for_lanes(mask, [&](int lane) { to[lane] = (a[lane] & sign) | (zero_extend(b[lane], i.type) & ~sign); });
}

void decode_copy_sign(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 2);
  i.execute = copy_sign;
}

}  // namespace

void add_compare(InstructionSet& set) {
  const std::vector<Type> numbers = both(both(BITS, INTEGERS), FLOATS);
  set.add("setp", numbers, decode_set_predicate);
  set.add("set",
          {Type::u16, Type::s16, Type::u32, Type::s32, Type::f16, Type::bf16, Type::f32, Type::f16x2, Type::bf16x2},
          decode_set);
  set.add("selp", both(both(BITS, INTEGERS), {Type::f32, Type::f64}), decode_select);
  set.add("slct", both(both(BITS, INTEGERS), {Type::f32, Type::f64}), decode_select_by_sign);
  set.add("testp", {Type::f32, Type::f64}, decode_test);
  set.add("copysign", {Type::f32, Type::f64}, decode_copy_sign);
}

}  // namespace ptx
