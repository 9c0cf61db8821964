// Between the lanes of a warp: shfl, vote, match, redux, activemask, elect, bar.warp.sync.
#include "elements.h"

namespace ptx {
namespace {

enum { UP, DOWN, BUTTERFLY, INDEX };  // shfl
enum { ALL, ANY, UNIFORM, BALLOT };   // vote

// The lanes that the instruction names must be those that execute it.
void check_members(Warp& warp, const Instruction& i, Mask mask, Row members) {
  if (members != NO_ROW) warp.need_all_lanes(i, mask, Mask(warp.uniform(members, mask)) & warp.live);
}

void shuffle(Warp& warp, const Instruction& i, Mask mask) {
  check_members(warp, i, mask, i.sources.size() > 3 ? i.sources[3] : NO_ROW);
  uint64_t values[WARP_SIZE], b[WARP_SIZE], c[WARP_SIZE];
  std::copy_n(warp.source(i, 0), WARP_SIZE, values);
  std::copy_n(warp.source(i, 1), WARP_SIZE, b);
  std::copy_n(warp.source(i, 2), WARP_SIZE, c);
  uint64_t* const to = warp.destination(i);
  uint64_t* const valid = i.destinations.size() > 1 ? warp.destination(i, 1) : nullptr;
  for_lanes(mask, [&](int lane) {
    const int by = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    const int wanted = i.operation == UP          ? lane - by
                       : i.operation == DOWN      ? lane + by
                       : i.operation == BUTTERFLY ? lane ^ by
                                                  : first | (by & ~segment);
    const bool inside = i.operation == UP ? wanted >= last : wanted <= last;
    const int from = inside ? wanted : lane;
    if (!(mask >> from & 1)) {
      warp.fault(FaultKind::divergent_warp, i, lane, "reads lane " + std::to_string(from) + ", which is not there");
    }
    to[lane] = uint32_t(values[from]);
    if (valid) valid[lane] = inside;
  });
}

void decode_shuffle(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto mode = mnemonic.one_of({"up", "down", "bfly", "idx"});
  if (!mode || !mnemonic.has("sync")) unsupported(mnemonic);
  i.operation = *mode;
  i.destinations.push_back(operands.row());
  if (operands.accept("|")) i.destinations.push_back(operands.row());
  operands.expect(",");
  operands.sources(i, 4);
  i.execute = shuffle;
}

void vote(Warp& warp, const Instruction& i, Mask mask) {
  check_members(warp, i, mask, i.sources[1]);
  const uint64_t* const predicate = warp.source(i, 0);
  uint64_t* const to = warp.destination(i);
  Mask holds = 0;
  for_lanes(mask, [&](int lane) { holds |= Mask((predicate[lane] & 1) ^ i.negate_predicate) << lane; });
  const uint64_t results[] = {holds == mask, holds != 0, holds == 0 || holds == mask, holds};
  for_lanes(mask, [&](int lane) { to[lane] = results[i.operation]; });
}

void decode_vote(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto mode = mnemonic.one_of({"all", "any", "uni", "ballot"});
  if (!mode || !mnemonic.has("sync")) unsupported(mnemonic);
  i.operation = *mode;
  i.destinations.push_back(operands.row());
  operands.expect(",");
  i.negate_predicate = operands.accept("!");
  operands.sources(i, 2);
  i.execute = vote;
}

// operation 1: match.all, which gives the mask only if every value is the same.
void match(Warp& warp, const Instruction& i, Mask mask) {
  check_members(warp, i, mask, i.sources[1]);
  uint64_t values[WARP_SIZE];
  std::copy_n(warp.source(i, 0), WARP_SIZE, values);
  for_lanes(mask, [&](int lane) {
    Mask same = 0;
    for_lanes(mask, [&](int other) { same |= Mask(zero_extend(values[lane] ^ values[other], i.type) == 0) << other; });
    const bool everywhere = same == mask;
    warp.destination(i)[lane] = i.operation == 1 && !everywhere ? 0 : same;
    if (i.destinations.size() > 1) warp.destination(i, 1)[lane] = everywhere;
  });
}

void decode_match(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  i.operation = mnemonic.has("all");
  i.destinations.push_back(operands.row());
  if (operands.accept("|")) i.destinations.push_back(operands.row());
  operands.expect(",");
  operands.sources(i, 2);
  i.execute = match;
}

enum { ADD, MIN, MAX, AND, OR, XOR };

uint32_t reduced(const Instruction& i, uint32_t a, uint32_t b) {
  if (i.type == Type::f32) {
    const float x = bit_cast<float>(a), y = bit_cast<float>(b);
    if (std::isnan(x) || std::isnan(y)) return i.propagate_nan ? 0x7fffffff : std::isnan(x) ? b : a;
    return (x < y) == (i.operation == MAX) ? b : a;
  }
  const bool less = is_signed(i.type) ? int32_t(a) < int32_t(b) : a < b;
  switch (i.operation) {
    case ADD:
      return a + b;
    case MIN:
      return less ? a : b;
    case MAX:
      return less ? b : a;
    case AND:
      return a & b;
    case OR:
      return a | b;
    default:
      return a ^ b;
  }
}

void reduce(Warp& warp, const Instruction& i, Mask mask) {
  check_members(warp, i, mask, i.sources[1]);
  const uint64_t* const values = warp.source(i, 0);
  uint32_t result = uint32_t(values[__builtin_ctz(mask)]);
  for_lanes(mask & (mask - 1), [&](int lane) { result = reduced(i, result, uint32_t(values[lane])); });
  uint64_t* const to = warp.destination(i);
  for_lanes(mask, [&](int lane) { to[lane] = result; });
}

void decode_reduce(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  const auto operation = mnemonic.one_of({"add", "min", "max", "and", "or", "xor"});
  const bool of_floats = i.type == Type::f32;
  if (!operation || mnemonic.has("abs") || (of_floats && *operation != MIN && *operation != MAX)) unsupported(mnemonic);
  i.operation = *operation;
  operands.destination_and_sources(i, 2);
  i.execute = reduce;
}

void active_mask(Warp& warp, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int lane) { warp.destination(i)[lane] = mask; });
}

void decode_active_mask(const Mnemonic&, Operands& operands, Instruction& i) {
  i.destinations.push_back(operands.row());
  i.execute = active_mask;
}

// elect: the lowest lane.
void elect(Warp& warp, const Instruction& i, Mask mask) {
  check_members(warp, i, mask, i.sources[0]);
  const int leader = __builtin_ctz(mask);
  for_lanes(mask, [&](int lane) {
    warp.destination(i)[lane] = uint64_t(leader);
    warp.destination(i, 1)[lane] = lane == leader;
  });
}

void decode_elect(const Mnemonic&, Operands& operands, Instruction& i) {
  i.destinations.push_back(operands.row());
  operands.expect("|");
  i.destinations.push_back(operands.row());
  operands.expect(",");
  operands.sources(i, 1);
  i.execute = elect;
}

}  // namespace

void add_exchange(InstructionSet& set) {
  set.add("shfl", {Type::b32}, decode_shuffle);
  set.add("vote", {Type::pred, Type::b32}, decode_vote);
  set.add("match", {Type::b32, Type::b64}, decode_match);
  set.add("redux", {Type::u32, Type::s32, Type::b32, Type::f32}, decode_reduce);
  set.add("activemask", {Type::b32}, decode_active_mask);
  set.add("elect", decode_elect);
}

}  // namespace ptx
