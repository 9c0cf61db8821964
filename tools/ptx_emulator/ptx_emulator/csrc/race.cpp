#include "race.h"

#include <algorithm>

namespace ptx {

void WarpClock::join(const std::vector<Clock>& other) {
  for (size_t w = 0; w < of.size(); ++w) of[w] = std::max(of[w], other[w]);
}

bool WarpClock::after_each(const Moment& then, int lane) const {
  for (Mask others = then.lanes & ~(Mask(1) << lane); others; others &= others - 1) {
    if (over[lane][__builtin_ctz(others)] <= then.epoch) return false;
  }
  return true;
}

void WarpClock::synchronise_lanes(Mask mask) {
  uint32_t latest = 0, joined[WARP_SIZE] = {};
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    if (!(mask >> lane & 1)) continue;
    latest = std::max(latest, epoch[lane]);
    if (mask == ALL_LANES) continue;
    for (int other = 0; other < WARP_SIZE; ++other) {
      joined[other] = std::max({joined[other], over[lane][other], over_for_all[lane]});
    }
  }
  if (mask == ALL_LANES) {
    std::fill_n(epoch, WARP_SIZE, latest + 1);
    std::fill_n(over_for_all, WARP_SIZE, latest + 1);
    return;
  }
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    if (mask >> lane & 1) joined[lane] = latest + 1;
  }
  const uint32_t least = *std::min_element(joined, joined + WARP_SIZE);
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    if (!(mask >> lane & 1)) continue;
    epoch[lane] = latest + 1;
    std::copy_n(joined, WARP_SIZE, over[lane]);
    over_for_all[lane] = least;
  }
}

namespace {

const char* description(AccessKind now, bool other_writes) {
  if (!other_writes) return "write after a read";
  return now == AccessKind::read ? "read after a write" : "write after a write";
}

}  // namespace

void SharedShadow::resize(size_t bytes, int cell, int warps) {
  cell_ = cell;
  warps_ = warps;
  const size_t cells = (bytes + size_t(cell) - 1) / size_t(cell);
  writes_.assign(cells, {});
  reads_.assign(cells * size_t(warps), {});
}

Conflict SharedShadow::touch(const WarpClock& clock, int lane, AccessKind kind, uint32_t offset, int bytes) {
  Conflict conflict;
  Moment now = clock.now(lane);
  now.atomic = kind == AccessKind::atomic;
  const size_t last = (offset + size_t(bytes) - 1) / size_t(cell_);
  for (size_t cell = offset / size_t(cell_); cell <= last; ++cell) {
    Moment& write = writes_[cell];
    if (write.clock && !clock.after(write, lane) && !(write.atomic && now.atomic)) {
      conflict = {description(kind, true), write, -1};
    }
    Moment* const reads = &reads_[cell * size_t(warps_)];
    if (kind == AccessKind::read) {
      reads[clock.warp] = clock.later(reads[clock.warp], now, lane);
      continue;
    }
    for (int w = 0; w < warps_; ++w) {
      const bool worse = !conflict.what || conflict.other.warp == clock.warp;  // another warp rather than another lane
      if (worse && reads[w].clock && !clock.after(reads[w], lane)) conflict = {description(kind, false), reads[w], -1};
    }
    write = now;
  }
  return conflict;
}

void GlobalShadow::resize(size_t bytes, int cell) {
  cell_ = cell;
  const size_t cells = (bytes + size_t(cell) - 1) / size_t(cell);
  writes_.assign(cells, {});
  reads_.assign(cells, {});
  atomics_.assign(cells, {});
}

bool GlobalShadow::before(const Mark& mark, const WarpClock& clock, uint32_t block, int lane) const {
  if (!mark.moment.clock) return true;
  return !mark.many_blocks && mark.block == block && clock.after(mark.moment, lane);
}

bool GlobalShadow::reads_before(size_t cell, const WarpClock& clock, uint32_t block, int lane,
                                Conflict& conflict) const {
  const Mark& mark = reads_[cell];
  if (!before(mark, clock, block, lane)) {
    conflict = {"write after a read", mark.moment, mark.block};
    return false;
  }
  const auto several = mark.moment.clock ? several_reads_.find(cell) : several_reads_.end();
  if (several == several_reads_.end()) return true;
  for (const Moment& read : several->second) {
    if (read.clock && !clock.after(read, lane)) {
      conflict = {"write after a read", read, mark.block};
      return false;
    }
  }
  return true;
}

void GlobalShadow::mark_read(size_t cell, const WarpClock& clock, uint32_t block, int lane) {
  Mark& mark = reads_[cell];
  const Moment now = clock.now(lane);
  if (!mark.moment.clock) {
    mark = {now, block, false};
  } else if (mark.block != block) {
    mark = {now, block, true};
    several_reads_.erase(cell);
  } else if (mark.moment.warp == now.warp) {
    mark.moment = clock.later(mark.moment, now, lane);
  } else {
    Reads& several = several_reads_[cell];
    several.resize(clock.of.size());
    several[mark.moment.warp] = mark.moment;
    several[now.warp] = clock.later(several[now.warp], now, lane);
    mark.moment = now;
  }
}

Conflict GlobalShadow::touch(const WarpClock& clock, uint32_t block, int lane, AccessKind kind, uint64_t offset,
                             int bytes) {
  Conflict conflict;
  const size_t last = (offset + size_t(bytes) - 1) / size_t(cell_);
  for (size_t cell = offset / size_t(cell_); cell <= last; ++cell) {
    const Mark& write = writes_[cell];
    if (!before(write, clock, block, lane)) conflict = {description(kind, true), write.moment, write.block};
    const Mark& atomic = atomics_[cell];
    if (kind != AccessKind::atomic && !before(atomic, clock, block, lane)) {
      conflict = {kind == AccessKind::read ? "read beside an atomic" : "write beside an atomic", atomic.moment,
                  atomic.block};
    }
    if (kind == AccessKind::read) {
      mark_read(cell, clock, block, lane);
      continue;
    }
    reads_before(cell, clock, block, lane, conflict);
    Mark& mark = (kind == AccessKind::write ? writes_ : atomics_)[cell];
    const bool others = mark.moment.clock && mark.block != block;
    mark = {clock.now(lane), block, kind == AccessKind::atomic && (mark.many_blocks || others)};
  }
  return conflict;
}

}  // namespace ptx
