// mov, cvta, isspacep, and the instructions that are hints.
#include "elements.h"

namespace ptx {
namespace {

void move(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = zero_extend(a[lane], i.type); });
}

void move_predicate(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = a[lane] & 1; });
}

uint64_t low_bits(int bits) { return bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1; }

// mov.b32 %r, {%h0, %h1}
void pack(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type) / int(i.sources.size());
  for_lanes(mask, [&](int lane) {
    uint64_t packed = 0;
    for (size_t n = 0; n < i.sources.size(); ++n) packed |= (warp.source(i, n)[lane] & low_bits(bits)) << bits * int(n);
    warp.destination(i)[lane] = packed;
  });
}

// mov.b32 {%h0, %h1}, %r
void unpack(Warp& warp, const Instruction& i, Mask mask) {
  const int bits = 8 * size_of(i.type) / int(i.destinations.size());
  for_lanes(mask, [&](int lane) {
    const uint64_t packed = warp.source(i, 0)[lane];
    for (size_t n = 0; n < i.destinations.size(); ++n) {
      warp.destination(i, n)[lane] = packed >> bits * int(n) & low_bits(bits);
    }
  });
}

void decode_move(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  i.destinations = operands.rows();
  operands.expect(",");
  i.sources = operands.rows();
  const size_t to = i.destinations.size(), from = i.sources.size();
  if (to > 1 && from > 1) unsupported(mnemonic);
  i.execute = i.type == Type::pred ? move_predicate : from > 1 ? pack : to > 1 ? unpack : move;
}

uint64_t window_of(Space space) {
  return space == Space::shared ? SHARED_WINDOW : space == Space::local ? LOCAL_WINDOW : 0;
}

// cvta: an address of a state space to a generic one; operation 1 is cvta.to, the other way.
void convert_address(Warp& warp, const Instruction& i, Mask mask) {
  const uint64_t window = window_of(i.space);
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) {
    const bool is_generic = a[lane] >= window;
    to[lane] = i.operation == 1 ? a[lane] - (is_generic ? window : 0) : a[lane] + (is_generic ? 0 : window);
  });
}

void decode_convert_address(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (i.space == Space::param) unsupported(mnemonic);
  i.operation = mnemonic.has("to");
  operands.destination_and_sources(i, 1);
  i.execute = convert_address;
}

void is_in_space(Warp& warp, const Instruction& i, Mask mask) {
  uint64_t* const to = warp.destination(i);
  const uint64_t* const a = warp.source(i, 0);
  for_lanes(mask, [&](int lane) { to[lane] = space_of_generic(a[lane]) == i.space; });
}

void decode_is_in_space(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (i.space != Space::global && i.space != Space::shared && i.space != Space::local) unsupported(mnemonic);
  operands.destination_and_sources(i, 1);
  i.execute = is_in_space;
}

// Changes nothing that the emulator models. A cache policy is an opaque value that only hints consume.
void do_nothing(Warp&, const Instruction&, Mask) {}

void decode_hint(const Mnemonic&, Operands& operands, Instruction& i) {
  operands.skip_rest();
  i.execute = do_nothing;
}

}  // namespace

void add_move(InstructionSet& set) {
  set.add("mov", both(both(BITS, INTEGERS), {Type::f32, Type::f64, Type::pred}), decode_move);
  set.add("cvta", {Type::u64}, decode_convert_address);
  set.add("isspacep", decode_is_in_space);
  for (const char* hint : {"prefetch", "prefetchu", "griddepcontrol", "applypriority", "discard"}) {
    set.add(hint, decode_hint);
  }
  set.add("nanosleep", {Type::u32}, decode_hint);
  set.add("createpolicy", {Type::b64}, decode_hint);
  set.add("setmaxnreg", {Type::u32}, decode_hint);
}

}  // namespace ptx
