// A warp: its registers, its lanes' positions in the code, and what it has in flight.
#pragma once
#include <deque>
#include <map>
#include <vector>

#include "fault.h"
#include "instruction.h"
#include "race.h"
#include "warpgroup_registers.h"

namespace ptx {

class Block;

// One cp.async of one lane. The bytes arrive when the lane waits for them, as late as the hardware may.
struct AsyncCopy {
  const Instruction* instruction;
  uint32_t to;
  uint64_t from;
  int bytes, from_bytes;  // the rest is filled with zeros
};

struct AsyncCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> committed;
};

// One wgmma that has been issued. It runs when the warp waits for it; until then its accumulators hold NaN.
struct WarpgroupProduct {
  const Instruction* instruction;
  uint64_t a_descriptor, b_descriptor;
  std::vector<float> a;  // [16, k], where A comes from registers
  bool accumulate;
};

struct WarpgroupProducts {
  std::vector<WarpgroupProduct> open;
  std::deque<std::vector<WarpgroupProduct>> committed;
  std::map<Row, std::vector<std::vector<uint64_t>>> accumulators;  // first row -> values of all rows
};

// Calls f(lane) for the lanes in `mask`.
template <class F>
inline void for_lanes(Mask mask, F f) {
  if (mask == ALL_LANES) {
    for (int lane = 0; lane < WARP_SIZE; ++lane) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

class Warp {
 public:
  Warp(Block& block, int index);

  // At the first instruction of a new block.
  void start(int lanes);

  // Executes until the warp ends, has to wait at a barrier, or has used up its turn (0: no limit).
  void run(uint64_t turn);
  bool can_run() const { return live != 0 && waiting_at == nullptr; }

  uint64_t* row(Row r) { return &registers_[size_t(r) * WARP_SIZE]; }

  uint64_t* destination(const Instruction& i, size_t n = 0) { return row(i.destinations[n]); }
  const uint64_t* source(const Instruction& i, size_t n) { return row(i.sources[n]); }
  // An operand that all lanes share, as those in `mask` see it.
  uint64_t uniform(Row r, Mask mask) { return row(r)[__builtin_ctz(mask)]; }

  void fault(FaultKind kind, const Instruction& instruction, int lane, const std::string& message);
  // Reports lanes that should have come along.
  void need_all_lanes(const Instruction& instruction, Mask mask, Mask wanted = ALL_LANES);

  Block& block;
  const int index;
  int lanes = 0;  // that exist
  Mask live = 0;  // that have not ended
  WarpClock clock;

  const Instruction* waiting_at = nullptr;  // a barrier
  int barrier = 0;

  AsyncCopies async_copies[WARP_SIZE];
  WarpgroupProducts products;
  WarpgroupRegisters product_registers;  // watched where the kernel uses wgmma
  std::vector<uint8_t> local;            // [lanes, bytes]

 private:
  struct Group {
    int at;       // where the lanes furthest behind are
    Mask lanes;   // which these are
    int meeting;  // where the next lanes are: there the two go on together
  };
  Group furthest_behind() const;
  bool step(Group& group);
  void move(Mask lanes, int to);
  Mask guarded(const Instruction& instruction, Mask lanes);
  void check_product_registers(const Instruction& instruction, Mask mask);
  bool branch(const Instruction& instruction, Group& group, Mask taken);
  void end(Mask lanes);

  std::vector<uint64_t> registers_;
  int at_[WARP_SIZE] = {};  // the next instruction of each lane
};

}  // namespace ptx
