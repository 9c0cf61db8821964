// cp.async: copies from global to shared memory that run beside the program.
//
// A copy may arrive at any time between its issue and the wait for its group. The emulator lets it arrive as late as
// possible, and treats every touch of its destination in between as a fault.
#include "elements.h"

namespace ptx {
namespace {

void issue(Warp& warp, const Instruction& i, Mask mask) {
  Block& block = warp.block;
  Grid& grid = block.grid;
  const uint64_t *const to = warp.row(i.address.base), *const from = warp.row(i.second_address.base);
  const int bytes = int(warp.uniform(i.sources[0], mask));
  const uint64_t* const given = i.sources.size() > 1 ? warp.source(i, 1) : nullptr;
  uint64_t addresses[WARP_SIZE];
  Mask reading = 0;
  for_lanes(mask, [&](int lane) {
    uint64_t offset = to[lane] + uint64_t(i.address.offset);
    offset = uint32_t(offset >= SHARED_WINDOW ? offset - SHARED_WINDOW : offset);
    addresses[lane] = from[lane] + uint64_t(i.second_address.offset);
    const int from_bytes = given ? std::min(bytes, int(uint32_t(given[lane]))) : bytes;
    if (offset % uint64_t(bytes) || (from_bytes && addresses[lane] % uint64_t(bytes))) {
      warp.fault(FaultKind::misaligned, i, lane, "a copy of " + std::to_string(bytes) + " bytes is not aligned");
      return;
    }
    if (!block.inside_shared(warp, i, lane, offset, bytes)) return;
    block.touch_shared(warp, i, lane, uint32_t(offset), bytes, AccessKind::write);
    block.set_in_flight(uint32_t(offset), bytes, true);
    warp.async_copies[lane].open.push_back({&i, uint32_t(offset), addresses[lane], bytes, from_bytes});
    grid.statistics.async_copy_bytes += uint64_t(from_bytes);
    if (from_bytes) reading |= Mask(1) << lane;
  });
  if (grid.options.statistics) grid.statistics.count_global(grid.memory, addresses, reading, bytes, false);
}

void arrive(Warp& warp, int lane, const AsyncCopy& copy) {
  Block& block = warp.block;
  const Instruction& i = *copy.instruction;
  uint8_t* const to = &block.shared[copy.to];
  block.set_in_flight(copy.to, copy.bytes, false);
  block.touch_shared(warp, i, lane, copy.to, copy.bytes, AccessKind::write);
  std::memset(to, 0, size_t(copy.bytes));
  const int step = copy.from_bytes == copy.bytes ? copy.bytes : 1;
  for (int n = 0; n < copy.from_bytes; n += step) {
    const uint8_t* from = block.reach(warp, i, lane, Space::global, copy.from + uint64_t(n), step, AccessKind::read);
    if (from) std::memcpy(to + n, from, size_t(step));
  }
}

void commit(AsyncCopies& copies) {
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

void commit_group(Warp& warp, const Instruction&, Mask mask) {
  for_lanes(mask, [&](int lane) { commit(warp.async_copies[lane]); });
}

// All but the latest `operation` groups have arrived.
void wait_group(Warp& warp, const Instruction& i, Mask mask) {
  for_lanes(mask, [&](int lane) {
    auto& committed = warp.async_copies[lane].committed;
    while (committed.size() > size_t(i.operation)) {
      for (const AsyncCopy& copy : committed.front()) arrive(warp, lane, copy);
      committed.pop_front();
    }
  });
}

void wait_all(Warp& warp, const Instruction& i, Mask mask) {
  commit_group(warp, i, mask);
  wait_group(warp, i, mask);
}

void decode_copy(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  if (!mnemonic.has("async") || mnemonic.has("bulk") || mnemonic.has("mbarrier")) unsupported(mnemonic);
  if (mnemonic.has("commit_group")) {
    i.execute = commit_group;
  } else if (mnemonic.has("wait_group")) {
    i.operation = operands.immediate();
    i.execute = wait_group;
  } else if (mnemonic.has("wait_all")) {
    i.execute = wait_all;
  } else {
    i.space = Space::generic;  // touches both
    i.access_bytes = 4;
    i.address = operands.address(nullptr);
    operands.expect(",");
    i.second_address = operands.address(nullptr);
    operands.expect(",");
    i.sources.push_back(operands.row());
    while (operands.accept(",")) i.sources.push_back(operands.row());
    if (mnemonic.has("L2::cache_hint")) i.sources.pop_back();
    if (i.sources.size() > 1 && operands.is_predicate(i.sources[1])) unsupported(mnemonic);
    i.execute = issue;
  }
}

}  // namespace

void add_async_copy(InstructionSet& set) { set.add("cp", decode_copy); }

}  // namespace ptx
