// A launch: what is asked for, and what comes of it.
#pragma once
#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "fault.h"
#include "memory.h"
#include "program.h"
#include "statistics.h"

namespace ptx {

// The order in which the warps of a block take turns. Round robin and reversed run each warp until it waits at a
// barrier; random interrupts it after a few instructions.
enum class Schedule : uint8_t { round_robin, reversed, random };

struct Options {
  Schedule schedule = Schedule::round_robin;
  uint64_t seed = 0;
  bool races = true, uninitialised = true, statistics = true;
  uint64_t instruction_limit = 2000000000;  // of warps
  size_t max_faults = 20;
};

struct LaunchRequest {
  std::array<int, 3> grid{1, 1, 1}, block{1, 1, 1};
  int dynamic_shared = 0;  // bytes
  std::vector<uint8_t> parameters;
  std::vector<Buffer> buffers;
};

class Grid {
 public:
  Grid(Program& program, const Kernel& kernel, LaunchRequest request, const Options& options);

  // Blocks run one after another.
  void run();

  int warps_per_block() const { return (threads() + WARP_SIZE - 1) / WARP_SIZE; }
  int threads() const { return request.block[0] * request.block[1] * request.block[2]; }

  const Kernel& kernel;
  LaunchRequest request;
  const Options options;
  GlobalMemory memory;
  Statistics statistics;
  std::vector<uint64_t> executed;  // by mnemonic
  Faults faults;
  std::mt19937_64 random;
  int shared_bytes = 0;
  int shared_cell = 16, global_cell = 16;  // bytes: the smallest access that the kernel makes
  uint64_t instructions = 0;               // of warps, so far
};

}  // namespace ptx
