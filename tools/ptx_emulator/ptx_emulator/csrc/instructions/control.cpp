// bra, ret, exit, trap, and the barriers of the block and of the warp.
#include "elements.h"

namespace ptx {
namespace {

void decode_branch(const Mnemonic&, Operands&, Instruction& i) { i.flow = Flow::branch; }  // the parser reads the label

void decode_exit(const Mnemonic&, Operands&, Instruction& i) { i.flow = Flow::exit; }

void trap(Warp& warp, const Instruction& i, Mask mask) {
  warp.fault(FaultKind::trap, i, __builtin_ctz(mask), "trap");
  throw Stop();
}

void decode_trap(const Mnemonic&, Operands&, Instruction& i) { i.execute = trap; }

// bar.warp.sync orders what the lanes of a warp did to memory.
void synchronise_lanes(Warp& warp, const Instruction& i, Mask mask) {
  const Mask members = Mask(warp.uniform(i.sources[0], mask)) & warp.live;
  warp.need_all_lanes(i, mask, members);
  warp.clock.synchronise_lanes(mask | ~warp.live);
}

// operation 1: arrives without waiting. combine: how bar.red joins predicates (1 popc, 2 and, 3 or).
void decode_barrier(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (mnemonic.has("warp")) {
    operands.sources(i, 1);
    i.execute = synchronise_lanes;
    return;
  }
  if (mnemonic.has("cluster")) unsupported(mnemonic);
  i.flow = Flow::barrier;
  if (mnemonic.has("red")) {
    i.combine = mnemonic.has("popc") ? 1 : mnemonic.has("and") ? 2 : 3;
    i.destinations.push_back(operands.row());
    operands.expect(",");
  }
  i.operation = mnemonic.has("arrive");
  operands.sources(i, 1);
  while (operands.accept(",")) {
    i.negate_predicate = operands.accept("!");
    i.sources.push_back(operands.row());
  }
}

}  // namespace

void add_control(InstructionSet& set) {
  set.add("bra", decode_branch);
  set.add("ret", decode_exit);
  set.add("exit", decode_exit);
  set.add("trap", decode_trap);
  set.add("bar", {Type::none, Type::pred, Type::u32}, decode_barrier);
  set.add("barrier", {Type::none, Type::pred, Type::u32}, decode_barrier);
}

}  // namespace ptx
