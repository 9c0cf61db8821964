#include "warp.h"

#include <algorithm>
#include <cstdio>

#include "block.h"

namespace ptx {
namespace {
constexpr uint64_t UNSET_REGISTER = 0xdeadbeefdeadbeefull;
constexpr int NOWHERE = 1 << 30;
}  // namespace

Warp::Warp(Block& block_, int index_) : block(block_), index(index_) {
  const Kernel& kernel = block.grid.kernel;
  registers_.assign(size_t(kernel.rows) * WARP_SIZE, UNSET_REGISTER);
  for (const auto& [r, value] : kernel.immediates) std::fill_n(row(r), WARP_SIZE, value);
  const auto is_product = [](const Instruction& instruction) { return instruction.warpgroup_product; };
  if (std::any_of(kernel.code.begin(), kernel.code.end(), is_product)) product_registers.resize(size_t(kernel.rows));
  clock.warp = index;
  clock.of.assign(size_t(block.grid.warps_per_block()), 0);
}

void Warp::start(int lanes_) {
  lanes = lanes_;
  live = lanes == WARP_SIZE ? ALL_LANES : (Mask(1) << lanes) - 1;
  waiting_at = nullptr;
  std::fill_n(at_, WARP_SIZE, 0);
  for (AsyncCopies& copies : async_copies) copies = {};
  products = {};
  if (product_registers.watches()) product_registers.resize(size_t(block.grid.kernel.rows));
  local.assign(size_t(block.grid.kernel.local_bytes) * WARP_SIZE, 0xcd);
  clock.synchronise_lanes(ALL_LANES);
}

Warp::Group Warp::furthest_behind() const {
  Group group{NOWHERE, 0, NOWHERE};
  for (Mask rest = live; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest), at = at_[lane];
    if (at < group.at) {
      group.meeting = group.at;
      group.at = at;
      group.lanes = 0;
    }
    if (at == group.at) {
      group.lanes |= Mask(1) << lane;
    } else {
      group.meeting = std::min(group.meeting, at);
    }
  }
  return group;
}

void Warp::move(Mask lanes, int to) {
  for (; lanes; lanes &= lanes - 1) at_[__builtin_ctz(lanes)] = to;
}

void Warp::run(uint64_t turn) {
  Grid& grid = block.grid;
  while (can_run()) {
    Group group = furthest_behind();
    if (group.lanes != live) ++grid.statistics.divergent;
    while (group.at != group.meeting && step(group)) {
      if (turn && --turn == 0) {
        move(group.lanes, group.at);
        return;
      }
    }
    if (group.at == group.meeting) move(group.lanes, group.at);
  }
}

Mask Warp::guarded(const Instruction& instruction, Mask lanes) {
  if (instruction.guard == NO_ROW) return lanes;
  const uint64_t* guard = row(instruction.guard);
  Mask holds = 0;
  for (int lane = 0; lane < WARP_SIZE; ++lane) holds |= Mask(guard[lane] & 1) << lane;
  return lanes & (instruction.guard_negated ? ~holds : holds);
}

// Executes one instruction; false where the group of lanes has to be chosen anew.
bool Warp::step(Group& group) {
  Grid& grid = block.grid;
  const Instruction& instruction = grid.kernel.code[size_t(group.at)];
  const Mask mask = guarded(instruction, group.lanes);
  ++grid.executed[size_t(instruction.mnemonic)];
  ++grid.statistics.warp_instructions;
  grid.statistics.lane_instructions += uint64_t(__builtin_popcount(mask));
  if (++grid.instructions > grid.options.instruction_limit) {
    fault(FaultKind::instruction_limit, instruction, __builtin_ctz(group.lanes),
          "instruction limit reached: an infinite loop, or a wait for another block");
    throw Stop();
  }
  switch (instruction.flow) {
    case Flow::next:
      if (mask) {
        if (product_registers.watches()) check_product_registers(instruction, mask);
        instruction.execute(*this, instruction, mask);
      }
      ++group.at;
      return true;
    case Flow::branch:
      return branch(instruction, group, mask);
    case Flow::exit:
      move(group.lanes & ~mask, group.at + 1);
      end(mask);
      return false;
    case Flow::barrier:
      move(group.lanes, group.at + 1);
      if (mask) block.arrive(*this, instruction, mask);
      return false;
  }
  return false;
}

void Warp::check_product_registers(const Instruction& instruction, Mask mask) {
  const char* wrong = product_registers.execute(instruction);
  if (wrong) fault(FaultKind::async_copy, instruction, __builtin_ctz(mask), wrong);
}

bool Warp::branch(const Instruction& instruction, Group& group, Mask taken) {
  if (taken == 0) {
    ++group.at;
    return true;
  }
  if (taken == live) {
    group.at = instruction.target;
    return true;
  }
  move(group.lanes & ~taken, group.at + 1);
  move(taken, instruction.target);
  return false;
}

void Warp::end(Mask lanes) {
  for (Mask rest = lanes; rest; rest &= rest - 1) async_copies[__builtin_ctz(rest)] = {};
  live &= ~lanes;
  if (!live) block.warp_ended();
}

void Warp::fault(FaultKind kind, const Instruction& instruction, int lane, const std::string& message) {
  Faults::Where where;
  where.instruction = &instruction;
  where.block = block.at;
  where.warp = index;
  where.lane = lane;
  block.grid.faults.add(kind, message, where);
}

void Warp::need_all_lanes(const Instruction& instruction, Mask mask, Mask wanted) {
  if (mask == wanted) return;
  char message[96];
  std::snprintf(message, sizeof message, "lanes %08x execute it, expected %08x", mask, wanted);
  fault(FaultKind::divergent_warp, instruction, __builtin_ctz(mask), message);
}

}  // namespace ptx
