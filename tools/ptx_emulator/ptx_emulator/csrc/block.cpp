#include "block.h"

#include <algorithm>
#include <cstring>

namespace ptx {
namespace {

// A pattern that is NaN as float and as bfloat16, and no small integer.
constexpr uint8_t UNINITIALISED[] = {0xad, 0xde, 0xc0, 0x7f};

std::string in_words(const Conflict& conflict, int64_t block) {
  std::string other = "warp " + std::to_string(conflict.other.warp);
  const Mask lanes = conflict.other.lanes;
  if ((lanes & (lanes - 1)) == 0) other += " lane " + std::to_string(__builtin_ctz(lanes));
  if (conflict.other_block >= 0 && conflict.other_block != block) {
    return std::string(conflict.what) + " by block " + std::to_string(conflict.other_block) + ", " + other +
           ": blocks are never ordered";
  }
  return std::string(conflict.what) + " by " + other + ", without a barrier between";
}

}  // namespace

Block::Block(Grid& grid_) : grid(grid_), index(0), shared(size_t(grid_.shared_bytes)) {
  const int count = grid.warps_per_block();
  shadow_.resize(grid.options.races ? shared.size() : 0, grid.shared_cell, count);
  warps_.reserve(size_t(count));
  for (int w = 0; w < count; ++w) warps_.emplace_back(*this, w);
}

void Block::run(std::array<int, 3> at_) {
  at = at_;
  for (size_t i = 0; i < shared.size(); ++i) shared[i] = UNINITIALISED[i % sizeof UNINITIALISED];
  state_.assign(shared.size(), 0);
  for (Barrier& barrier : barriers_) barrier.reset();

  std::vector<Clock> latest(warps_.size());
  for (size_t w = 0; w < warps_.size(); ++w) latest[w] = warps_[w].clock.of[w];
  for (Warp& warp : warps_) {
    warp.start(std::min(WARP_SIZE, grid.threads() - warp.index * WARP_SIZE));
    warp.clock.join(latest);
    warp.clock.advance();
  }
  set_special_registers();

  turn_ = 0;
  while (living_warps()) {
    if (Warp* warp = next_warp()) {
      const bool interrupt = grid.options.schedule == Schedule::random;
      warp->run(interrupt ? 1 + grid.random() % 32 : 0);
    } else {
      deadlock();
    }
  }
  ++index;
}

int Block::living_warps() const {
  return int(std::count_if(warps_.begin(), warps_.end(), [](const Warp& warp) { return warp.live != 0; }));
}

Warp* Block::next_warp() {
  const size_t count = warps_.size();
  const size_t first = grid.options.schedule == Schedule::random ? grid.random() % count : turn_++ % count;
  for (size_t step = 0; step < count; ++step) {
    const size_t position = (first + step) % count;
    Warp& warp = warps_[grid.options.schedule == Schedule::reversed ? count - 1 - position : position];
    if (warp.can_run()) return &warp;
  }
  return nullptr;
}

void Block::deadlock() {
  std::string message = "deadlock:";
  const Instruction* first = nullptr;
  const Warp* witness = nullptr;
  for (const Warp& warp : warps_) {
    if (!warp.live) continue;
    message += " warp " + std::to_string(warp.index) + " waits at barrier " + std::to_string(warp.barrier) +
               " (PTX line " + std::to_string(warp.waiting_at->line) + ");";
    if (first) continue;
    first = warp.waiting_at;
    witness = &warp;
  }
  message.pop_back();
  const_cast<Warp*>(witness)->fault(FaultKind::deadlock, *first, __builtin_ctz(witness->live), message);
  throw Stop();
}

// --- barriers ---

void Block::arrive(Warp& warp, const Instruction& instruction, Mask mask) {
  const int lane = __builtin_ctz(mask);
  ++grid.statistics.barriers;
  if (mask != warp.live) {
    warp.fault(FaultKind::divergent_barrier, instruction, lane, "only some lanes of the warp arrive at the barrier");
  }
  const uint64_t id = warp.uniform(instruction.sources[0], mask);
  const size_t counts = instruction.sources.size() - (instruction.combine ? 1 : 0);
  const int expected = counts > 1 ? int(warp.uniform(instruction.sources[1], mask)) : 0;
  if (id >= BARRIERS) {
    warp.fault(FaultKind::barrier, instruction, lane, "there is no barrier " + std::to_string(id));
    throw Stop();
  }
  Mask holds = 0;
  if (instruction.combine) {
    const uint64_t* predicate = warp.row(instruction.sources.back());
    for_lanes(mask, [&](int l) { holds |= Mask((predicate[l] & 1) ^ instruction.negate_predicate) << l; });
  }
  warp.clock.synchronise_lanes(mask | ~warp.live);  // a barrier does not wait for lanes that have ended
  const char* wrong = barriers_[id].arrive(warp.clock, expected, holds == mask, holds != 0, __builtin_popcount(holds));
  if (wrong) warp.fault(FaultKind::barrier, instruction, lane, wrong);
  const bool only_arrives = instruction.operation == 1;
  if (only_arrives) {
    warp.clock.advance();
  } else {
    warp.waiting_at = &instruction;
    warp.barrier = int(id);
  }
  release_barriers();
}

void Block::release_barriers() {
  for (int b = 0; b < BARRIERS; ++b) {
    if (barriers_[b].complete(living_warps())) release(b);
  }
}

void Block::release(int b) {
  const Barrier barrier = barriers_[b];
  barriers_[b].reset();
  for (Warp& warp : warps_) {
    if (!warp.waiting_at || warp.barrier != b) continue;
    const Instruction& instruction = *warp.waiting_at;
    if (instruction.combine) {
      const uint64_t result = instruction.combine == 1   ? uint64_t(barrier.count())
                              : instruction.combine == 2 ? uint64_t(barrier.all())
                                                         : uint64_t(barrier.any());
      for_lanes(warp.live, [&](int lane) { warp.destination(instruction)[lane] = result; });
    }
    warp.clock.join(barrier.joined());
    warp.clock.advance();
    warp.waiting_at = nullptr;
  }
}

// A warp that has ended no longer keeps the others waiting.
void Block::warp_ended() { release_barriers(); }

// --- memory ---

uint8_t* Block::reach(Warp& warp, const Instruction& instruction, int lane, Space space, uint64_t address, int bytes,
                      AccessKind kind, const uint8_t* storing) {
  if (space == Space::param) return grid.request.parameters.data() + address;
  if (space == Space::generic) space = space_of_generic(address);
  if (space == Space::shared && address >= SHARED_WINDOW) address -= SHARED_WINDOW;
  if (space == Space::local && address >= LOCAL_WINDOW) address -= LOCAL_WINDOW;
  if (address % uint64_t(bytes)) {
    Faults::Where where{&instruction, at, warp.index, lane, address, 0, name_of(space)};
    grid.faults.add(FaultKind::misaligned, "an access of " + std::to_string(bytes) + " bytes is not aligned", where);
    return nullptr;
  }
  switch (space) {
    case Space::shared:
      return reach_shared(warp, instruction, lane, address, bytes, kind, storing);
    case Space::local: {
      const uint64_t size = uint64_t(grid.kernel.local_bytes);
      if (address + uint64_t(bytes) <= size) return &warp.local[uint64_t(lane) * size + address];
      Faults::Where where{&instruction, at, warp.index, lane, address, int64_t(address), "local memory"};
      grid.faults.add(FaultKind::out_of_bounds, "local memory has " + std::to_string(size) + " bytes", where);
      return nullptr;
    }
    default:
      return reach_global(warp, instruction, lane, address, bytes, kind, storing);
  }
}

bool Block::inside_shared(Warp& warp, const Instruction& instruction, int lane, uint64_t offset, int bytes) {
  if (is_inside_shared(offset, bytes)) return true;
  Faults::Where where{&instruction, at, warp.index, lane, offset, int64_t(offset), "shared memory"};
  grid.faults.add(FaultKind::out_of_bounds,
                  "bytes " + std::to_string(offset) + " to " + std::to_string(offset + uint64_t(bytes) - 1) +
                      " of shared memory, which has " + std::to_string(shared.size()),
                  where);
  return false;
}

uint8_t* Block::reach_shared(Warp& warp, const Instruction& instruction, int lane, uint64_t offset, int bytes,
                             AccessKind kind, const uint8_t* storing) {
  if (!inside_shared(warp, instruction, lane, offset, bytes)) return nullptr;
  uint8_t* const place = &shared[offset];
  if (storing && std::memcmp(place, storing, size_t(bytes)) == 0 && all_written(&state_[offset], bytes)) {
    ++grid.statistics.duplicate_stores;
    return place;
  }
  touch_shared(warp, instruction, lane, uint32_t(offset), bytes, kind);
  return place;
}

void Block::touch_shared(Warp& warp, const Instruction& instruction, int lane, uint32_t offset, int bytes,
                         AccessKind kind) {
  const auto report = [&](FaultKind fault, const std::string& message) {
    grid.faults.add(fault, message, {&instruction, at, warp.index, lane, offset, int64_t(offset), "shared memory"});
  };
  uint8_t* const state = &state_[offset];
  if (!all_written(state, bytes)) {
    const auto any = [&](uint8_t what, bool set) {
      return std::any_of(state, state + bytes, [&](uint8_t byte) { return bool(byte & what) == set; });
    };
    if (any(IN_FLIGHT, true)) {
      report(FaultKind::async_copy, "shared memory is touched while an asynchronous copy to it is in flight");
    } else if (kind != AccessKind::write && grid.options.uninitialised && any(WRITTEN, false)) {
      report(FaultKind::uninitialised, "shared memory is read before it is written");
    }
    for (int n = 0; n < bytes; ++n) state[n] |= WRITTEN;
  }
  if (!grid.options.races || instruction.exempt) return;
  const Conflict conflict = shadow_.touch(warp.clock, lane, kind, offset, bytes);
  if (!conflict.what) return;
  const bool same_warp = conflict.other.warp == warp.index;
  report(same_warp ? FaultKind::warp_race : FaultKind::shared_race, in_words(conflict, index));
}

void Block::set_in_flight(uint32_t offset, int bytes, bool in_flight) {
  for (int n = 0; n < bytes; ++n) {
    state_[offset + uint32_t(n)] = in_flight ? WRITTEN | IN_FLIGHT : WRITTEN;
  }
}

uint8_t* Block::reach_global(Warp& warp, const Instruction& instruction, int lane, uint64_t address, int bytes,
                             AccessKind kind, const uint8_t* storing) {
  Faults::Where where{&instruction, at, warp.index, lane, address, 0, ""};
  Buffer* const buffer = grid.memory.find(address, bytes);
  if (!buffer) {
    std::string message = std::string(kind == AccessKind::read ? "read" : "write") + " of " + std::to_string(bytes) +
                          " bytes outside every buffer";
    if (const Buffer* near = grid.memory.nearest(address)) {
      where.buffer = near->name;
      where.offset = int64_t(address - near->address);
      message += "; the nearest has " + std::to_string(near->size) + " bytes";
    }
    grid.faults.add(FaultKind::out_of_bounds, message, where);
    return nullptr;
  }
  uint8_t* const place = reinterpret_cast<uint8_t*>(address);
  if (kind != AccessKind::read && !buffer->writable) {
    where.buffer = buffer->name;
    where.offset = int64_t(address - buffer->address);
    grid.faults.add(FaultKind::read_only, "write to an input", where);
    return nullptr;
  }
  // Nobody writes to a read-only buffer, so nobody races on it.
  if (!grid.options.races || instruction.exempt || !buffer->writable) return place;
  if (storing && std::memcmp(place, storing, size_t(bytes)) == 0) {
    ++grid.statistics.duplicate_stores;
    return place;
  }
  if (buffer->shadow.empty()) buffer->shadow.resize(buffer->size + 16, grid.global_cell);
  const uint64_t offset = address - buffer->address / 16 * 16;
  const Conflict conflict = buffer->shadow.touch(warp.clock, index, lane, kind, offset, bytes);
  if (conflict.what) {
    where.buffer = buffer->name;
    where.offset = int64_t(address - buffer->address);
    const bool same_warp = conflict.other_block == int64_t(index) && conflict.other.warp == warp.index;
    grid.faults.add(same_warp ? FaultKind::warp_race : FaultKind::global_race, in_words(conflict, index), where);
  }
  return place;
}

// --- special registers ---

void Block::set_special_registers() {
  const auto& [nx, ny, nz] = grid.request.block;
  const auto& blocks = grid.request.grid;
  const auto value = [&](Special which, int warp, int lane) -> uint64_t {
    const int thread = warp * WARP_SIZE + lane;
    const uint64_t below = (uint64_t(1) << lane) - 1, self = uint64_t(1) << lane;
    switch (which) {
      case Special::tid_x:
        return uint64_t(thread % nx);
      case Special::tid_y:
        return uint64_t(thread / nx % ny);
      case Special::tid_z:
        return uint64_t(thread / nx / ny);
      case Special::ntid_x:
        return uint64_t(nx);
      case Special::ntid_y:
        return uint64_t(ny);
      case Special::ntid_z:
        return uint64_t(nz);
      case Special::ctaid_x:
        return uint64_t(at[0]);
      case Special::ctaid_y:
        return uint64_t(at[1]);
      case Special::ctaid_z:
        return uint64_t(at[2]);
      case Special::nctaid_x:
        return uint64_t(blocks[0]);
      case Special::nctaid_y:
        return uint64_t(blocks[1]);
      case Special::nctaid_z:
        return uint64_t(blocks[2]);
      case Special::laneid:
        return uint64_t(lane);
      case Special::warpid:
        return uint64_t(warp);
      case Special::nwarpid:
        return warps_.size();
      case Special::lanemask_eq:
        return self;
      case Special::lanemask_lt:
        return below;
      case Special::lanemask_le:
        return below | self;
      case Special::lanemask_gt:
        return uint32_t(~(below | self));
      case Special::lanemask_ge:
        return uint32_t(~below);
      case Special::dynamic_shared_size:
        return uint64_t(grid.request.dynamic_shared);
      case Special::total_shared_size:
        return shared.size();
      case Special::nsmid:
      case Special::one:
        return 1;
      case Special::smid:
      case Special::zero:
        return 0;
    }
    return 0;
  };
  for (Warp& warp : warps_) {
    for (const auto& [r, which] : grid.kernel.special) {
      for (int lane = 0; lane < WARP_SIZE; ++lane) warp.row(r)[lane] = value(which, warp.index, lane);
    }
  }
}

}  // namespace ptx
