// Happens-before between the lanes of a block, and the shadow memory that remembers who touched what.
//
// Warps carry vector clocks that barriers join (as in FastTrack, Flanagan and Freund 2009). Within a warp, lanes are
// ordered only by bar.warp.sync and by barriers: each lane has an epoch, which these raise, and knows which epochs of
// the other lanes are over. Two accesses to the same cell conflict if one is a write, not both are atomic, and neither
// happens before the other. Blocks of one launch are never ordered.
//
// Clocks and epochs keep growing from block to block, and a block starts with all its warps joined; marks that earlier
// blocks left in shared memory are therefore in the past, and nothing has to be cleared.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "instruction.h"

namespace ptx {

enum class AccessKind : uint8_t { read, write, atomic };

using Clock = uint32_t;

// A moment in the life of one lane (or of several lanes of one warp).
struct Moment {
  Clock clock = 0;  // 0: never
  uint32_t epoch = 0;
  Mask lanes = 0;
  uint16_t warp = 0, atomic = 0;
};

// The synchronisation state of a warp.
struct WarpClock {
  int warp = 0;
  std::vector<Clock> of;  // of[w]: what this warp has seen of warp w; of[warp]: its own time
  uint32_t epoch[WARP_SIZE] = {};
  // The epochs of `other` below over[lane][other], and those of all below over_for_all[lane], are before `lane`.
  uint32_t over[WARP_SIZE][WARP_SIZE] = {}, over_for_all[WARP_SIZE] = {};

  Moment now(int lane) const { return {of[size_t(warp)], epoch[lane], Mask(1) << lane, uint16_t(warp), 0}; }

  // Whether `then` happens before what `lane` does now.
  bool after(const Moment& then, int lane) const {
    if (then.warp != warp) return of[then.warp] >= then.clock;
    return over_for_all[lane] > then.epoch || after_each(then, lane);
  }
  bool after_each(const Moment& then, int lane) const;

  // What remains of two reads by lanes of this warp.
  Moment later(const Moment& mark, Moment now, int lane) const {
    if (mark.clock != now.clock) return now;  // a barrier lies between
    if (mark.epoch == now.epoch) {
      now.lanes |= mark.lanes;
    } else if (!after(mark, lane)) {
      now.lanes |= mark.lanes;
      now.epoch = now.epoch > mark.epoch ? now.epoch : mark.epoch;
    }
    return now;
  }

  void join(const std::vector<Clock>& other);
  void advance() { ++of[size_t(warp)]; }
  void synchronise_lanes(Mask mask);
};

// Who touched a cell last; `other` is the one in conflict.
struct Conflict {
  const char* what = nullptr;  // null: none
  Moment other;
  int64_t other_block = -1;
};

// Cells of a fixed number of bytes, the smallest access that the kernel makes.
class SharedShadow {
 public:
  void resize(size_t bytes, int cell, int warps);

  Conflict touch(const WarpClock& clock, int lane, AccessKind kind, uint32_t offset, int bytes);

  // Remembers a read that happens after every write; false, and nothing remembered, where it does not.
  bool read_in_order(const WarpClock& clock, int lane, uint32_t offset, int bytes) {
    const size_t first = offset / uint32_t(cell_), last = (offset + uint32_t(bytes) - 1) / uint32_t(cell_);
    for (size_t cell = first; cell <= last; ++cell) {
      if (writes_[cell].clock && !clock.after(writes_[cell], lane)) return false;
    }
    const Moment now = clock.now(lane);
    for (size_t cell = first; cell <= last; ++cell) {
      Moment& read = reads_[cell * size_t(warps_) + size_t(clock.warp)];
      read = clock.later(read, now, lane);
    }
    return true;
  }

 private:
  int cell_ = 1, warps_ = 1;
  std::vector<Moment> writes_;  // [cells]
  std::vector<Moment> reads_;   // [cells, warps]
};

class GlobalShadow {
 public:
  void resize(size_t bytes, int cell);
  bool empty() const { return writes_.empty(); }

  Conflict touch(const WarpClock& clock, uint32_t block, int lane, AccessKind kind, uint64_t offset, int bytes);

 private:
  struct Mark {
    Moment moment;
    uint32_t block = 0;
    bool many_blocks = false;
  };
  using Reads = std::vector<Moment>;  // by warp, where several warps of a block read the same cell

  bool before(const Mark& mark, const WarpClock& clock, uint32_t block, int lane) const;
  bool reads_before(size_t cell, const WarpClock& clock, uint32_t block, int lane, Conflict& conflict) const;
  void mark_read(size_t cell, const WarpClock& clock, uint32_t block, int lane);

  int cell_ = 1;
  std::vector<Mark> writes_, reads_, atomics_;
  std::unordered_map<size_t, Reads> several_reads_;
};

}  // namespace ptx
