// What is found to be wrong while a kernel runs.
#pragma once
#include <array>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace ptx {

enum class FaultKind : uint8_t {
  out_of_bounds,
  misaligned,
  read_only,
  uninitialised,
  shared_race,
  global_race,
  warp_race,
  async_copy,
  divergent_barrier,
  divergent_warp,
  deadlock,
  instruction_limit,
  trap,
  matrix,
  barrier,
};

const char* name_of(FaultKind kind);

struct Fault {
  FaultKind kind;
  std::string message, kernel, instruction, source, buffer;
  int line = 0;
  std::array<int, 3> block{};
  int warp = -1, lane = -1;
  uint64_t address = 0;
  int64_t offset = 0;  // of the address in the buffer, or in shared memory
};

// Ends the launch: nothing sensible can follow.
struct Stop : std::runtime_error {
  Stop() : std::runtime_error("stopped") {}
};

// Keeps one fault for each kind and instruction; the first is where to look.
class Faults {
 public:
  Faults(const Kernel& kernel, const Program& program, size_t most) : kernel_(kernel), program_(program), most_(most) {}

  struct Where {
    const Instruction* instruction = nullptr;
    std::array<int, 3> block{};
    int warp = -1, lane = -1;
    uint64_t address = 0;
    int64_t offset = 0;
    std::string buffer;
  };

  void add(FaultKind kind, const std::string& message, const Where& where);
  const std::vector<Fault>& found() const { return found_; }

 private:
  const Kernel& kernel_;
  const Program& program_;
  size_t most_;
  std::set<std::pair<FaultKind, const Instruction*>> seen_;
  std::vector<Fault> found_;
};

}  // namespace ptx
