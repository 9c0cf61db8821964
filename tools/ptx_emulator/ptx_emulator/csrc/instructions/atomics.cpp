// atom, red, and the fences that order memory.
//
// Lanes perform their atomics one after another, lowest first.
#include "elements.h"

namespace ptx {
namespace {

enum { ADD, MIN, MAX, AND, OR, XOR, EXCHANGE, COMPARE_AND_SWAP, INCREMENT, DECREMENT };

double load_float(uint64_t bits, Type type) {
  switch (type) {
    case Type::f16:
      return half_to_float(uint16_t(bits));
    case Type::bf16:
      return bfloat_to_float(uint16_t(bits));
    case Type::f32:
      return bit_cast<float>(uint32_t(bits));
    default:
      return bit_cast<double>(bits);
  }
}

uint64_t add_floats(uint64_t a, uint64_t b, Type type) {
  switch (type) {
    case Type::f16:
      return double_to_half(load_float(a, type) + load_float(b, type));
    case Type::bf16:
      return double_to_bfloat(load_float(a, type) + load_float(b, type));
    case Type::f32:
      return bit_cast<uint32_t>(bit_cast<float>(uint32_t(a)) + bit_cast<float>(uint32_t(b)));
    default:
      return bit_cast<uint64_t>(bit_cast<double>(a) + bit_cast<double>(b));
  }
}

uint64_t add(uint64_t a, uint64_t b, Type type) {
  if (!is_packed(type)) return is_float(type) ? add_floats(a, b, type) : zero_extend(a + b, type);
  const Type part = type == Type::f16x2 ? Type::f16 : Type::bf16;
  return add_floats(a, b, part) | add_floats(a >> 16, b >> 16, part) << 16;
}

uint64_t extreme(uint64_t a, uint64_t b, Type type, bool larger) {
  if (is_float(type)) {
    const double x = load_float(a, type), y = load_float(b, type);
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) ? b : a;
    return (x < y || (x == y && std::signbit(x))) == larger ? b : a;
  }
  const bool less =
      is_signed(type) ? sign_extend(a, type) < sign_extend(b, type) : zero_extend(a, type) < zero_extend(b, type);
  return less == larger ? b : a;
}

uint64_t combined(const Instruction& i, uint64_t old, uint64_t value, uint64_t swap) {
  switch (i.operation) {
    case ADD:
      return add(old, value, i.type);
    case MIN:
      return extreme(old, value, i.type, false);
    case MAX:
      return extreme(old, value, i.type, true);
    case AND:
      return old & value;
    case OR:
      return old | value;
    case XOR:
      return old ^ value;
    case EXCHANGE:
      return value;
    case COMPARE_AND_SWAP:
      return old == zero_extend(value, i.type) ? swap : old;
    case INCREMENT:
      return old >= uint32_t(value) ? 0 : old + 1;
    default:
      return old == 0 || old > uint32_t(value) ? value : old - 1;
  }
}

void atomic(Warp& warp, const Instruction& i, Mask mask) {
  const int size = size_of(i.type);
  const uint64_t* const base = warp.row(i.address.base);
  const uint64_t* const swap = i.operation == COMPARE_AND_SWAP ? warp.source(i, 1) : warp.source(i, 0);
  warp.block.grid.statistics.atomics += uint64_t(__builtin_popcount(mask));
  for_lanes(mask, [&](int lane) {
    uint64_t address = base[lane] + uint64_t(i.address.offset);
    if (i.space == Space::shared && address < SHARED_WINDOW) address = uint32_t(address);
    uint8_t* place = warp.block.reach(warp, i, lane, i.space, address, size * i.vector, AccessKind::atomic);
    if (!place) return;
    for (int n = 0; n < i.vector; ++n) {
      uint64_t old = 0;
      std::memcpy(&old, place + n * size, size_t(size));
      const uint64_t now = combined(i, old, warp.source(i, size_t(n))[lane], swap[lane]);
      std::memcpy(place + n * size, &now, size_t(size));
      if (!i.destinations.empty()) warp.destination(i, size_t(n))[lane] = old;
    }
  });
}

void decode_atomic(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto operation = mnemonic.one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  const bool on_memory = i.space == Space::generic || i.space == Space::global || i.space == Space::shared;
  if (!operation || !on_memory || mnemonic.has("async")) unsupported(mnemonic);
  i.operation = *operation;
  if (mnemonic.base == "atom") {
    i.destinations = operands.rows();
    operands.expect(",");
  }
  i.address = operands.address(nullptr);
  operands.expect(",");
  i.sources = operands.rows();
  i.vector = int(i.sources.size());
  if (i.operation == COMPARE_AND_SWAP) {
    operands.expect(",");
    i.sources.push_back(operands.row());
  } else if (operands.accept(",")) {
    operands.row();  // a cache policy
  }
  i.access_bytes = size_of(i.type) * i.vector;
  i.execute = atomic;
}

// Blocks run one after another and warps see each other's stores at once: there is nothing to order.
void decode_fence(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.skip_rest();
  i.execute = [](Warp&, const Instruction&, Mask) {};
}

}  // namespace

void add_atomics(InstructionSet& set) {
  const std::vector<Type> types = both(both(BITS, {Type::u32, Type::u64, Type::s32, Type::s64}), FLOATS);
  set.add("atom", types, decode_atomic);
  set.add("red", both({Type::b32, Type::b64, Type::u32, Type::u64, Type::s32, Type::s64}, FLOATS), decode_atomic);
  set.add("fence", decode_fence);
  set.add("membar", decode_fence);
}

}  // namespace ptx
