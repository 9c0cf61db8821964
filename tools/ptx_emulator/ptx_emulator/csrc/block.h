// A block: shared memory, barriers, warps and the order in which they take turns.
#pragma once
#include <random>
#include <vector>

#include "barrier.h"
#include "grid.h"
#include "warp.h"

namespace ptx {

constexpr uint8_t WRITTEN = 1, IN_FLIGHT = 2;  // the state of a byte of shared memory

template <class Word>
inline bool all_equal(const uint8_t* states, uint8_t state) {
  Word word;
  std::memcpy(&word, states, sizeof word);
  return word == Word(Word(~Word(0)) / 255 * state);
}

inline bool all_written(const uint8_t* states, int bytes) {
  switch (bytes) {
    case 1:
      return *states == WRITTEN;
    case 2:
      return all_equal<uint16_t>(states, WRITTEN);
    case 4:
      return all_equal<uint32_t>(states, WRITTEN);
    default:
      return all_equal<uint64_t>(states, WRITTEN) && (bytes == 8 || all_written(states + 8, bytes - 8));
  }
}

class Block {
 public:
  explicit Block(Grid& grid);

  void run(std::array<int, 3> at);

  // The host address of `bytes` bytes that `lane` accesses, or null where that is a fault. `storing` are the bytes of a
  // plain store: one that changes nothing is harmless, whoever else stores the same.
  uint8_t* reach(Warp& warp, const Instruction& instruction, int lane, Space space, uint64_t address, int bytes,
                 AccessKind kind, const uint8_t* storing = nullptr);

  // The same for a read of shared memory with which nothing is wrong; null where `reach` has to look closer.
  const uint8_t* reach_readily(const Warp& warp, int lane, uint64_t offset, int bytes) {
    const bool plain = offset % uint64_t(bytes) == 0 && is_inside_shared(offset, bytes);
    if (!plain || !all_written(&state_[offset], bytes)) return nullptr;
    if (grid.options.races && !shadow_.read_in_order(warp.clock, lane, uint32_t(offset), bytes)) return nullptr;
    return &shared[offset];
  }

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
  bool is_inside_shared(uint64_t offset, int bytes) const { return offset + uint64_t(bytes) <= shared.size(); }
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

  std::vector<uint8_t> state_;  // of each byte of shared memory: WRITTEN, IN_FLIGHT
  SharedShadow shadow_;
  std::vector<Warp> warps_;
  Barrier barriers_[BARRIERS];
  size_t turn_ = 0;
};

}  // namespace ptx
