// A block: shared memory, barriers, warps and the order in which they take turns.
#pragma once
#include <random>
#include <vector>

#include "barrier.h"
#include "grid.h"
#include "warp.h"

namespace ptx {

class Block {
 public:
  explicit Block(Grid& grid);

  void run(std::array<int, 3> at);

  // The host address of `bytes` bytes that `lane` accesses, or null where that is a fault. `storing` are the bytes of a
  // plain store: one that changes nothing is harmless, whoever else stores the same.
  uint8_t* reach(Warp& warp, const Instruction& instruction, int lane, Space space, uint64_t address, int bytes,
                 AccessKind kind, const uint8_t* storing = nullptr);

  // Whether the lane may use these bytes of shared memory; reports it if not.
  bool inside_shared(Warp& warp, const Instruction& instruction, int lane, uint64_t offset, int bytes);
  void touch_shared(Warp& warp, const Instruction& instruction, int lane, uint32_t offset, int bytes, AccessKind kind);
  void set_in_flight(uint32_t offset, int bytes, bool in_flight);

  void arrive(Warp& warp, const Instruction& instruction, Mask mask);
  void warp_ended();

  Grid& grid;
  std::array<int, 3> at{};
  uint32_t index = 0;  // of the block in the grid
  std::vector<uint8_t> shared;

 private:
  uint8_t* reach_shared(Warp& warp, const Instruction& instruction, int lane, uint64_t offset, int bytes,
                        AccessKind kind, const uint8_t* storing);
  uint8_t* reach_global(Warp& warp, const Instruction& instruction, int lane, uint64_t address, int bytes,
                        AccessKind kind, const uint8_t* storing);
  void set_special_registers();
  Warp* next_warp();
  void release_barriers();
  void release(int barrier);
  [[noreturn]] void deadlock();
  int living_warps() const;

  std::vector<uint8_t> written_, in_flight_;  // per byte of shared memory
  SharedShadow shadow_;
  std::vector<Warp> warps_;
  Barrier barriers_[BARRIERS];
  size_t turn_ = 0;
};

}  // namespace ptx
