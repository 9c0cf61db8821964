// One decoded instruction.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "numbers.h"
#include "types.h"

namespace ptx {

class Warp;
struct Instruction;

constexpr int WARP_SIZE = 32;
using Mask = uint32_t;  // one bit per lane
constexpr Mask ALL_LANES = ~Mask(0);

using Execute = void (*)(Warp& warp, const Instruction& instruction, Mask mask);

// What the warp's own loop has to know; everything else is in `execute`.
enum class Flow : uint8_t { next, branch, exit, barrier };

// An operand is a row of the register file. Immediates and special registers have rows of their own.
using Row = int;
constexpr Row NO_ROW = -1;

struct Address {
  Row base = NO_ROW;
  int64_t offset = 0;
};

struct Source {
  int file = 0, line = 0;  // of .file and .loc; 0: unknown
};

struct Instruction {
  Execute execute = nullptr;
  Execute inner = nullptr;  // what a wrapping `execute` calls
  Flow flow = Flow::next;

  Row guard = NO_ROW;
  bool guard_negated = false;
  int target = -1;  // of a branch: index of an instruction

  std::vector<Row> destinations, sources;
  Address address, second_address;
  Space space = Space::generic;
  int vector = 1;        // elements of one access
  int access_bytes = 0;  // of the smallest access to shared or global memory; 0: none

  Type type = Type::none;         // the first type of the mnemonic
  Type source_type = Type::none;  // the last
  Rounding rounding = Rounding::nearest;
  bool flush = false, saturate = false, relu = false, propagate_nan = false, transposed = false;
  bool to_integer = false;    // cvt to an integral value
  bool extend_to_64 = false;  // ld: a signed value is extended to a register of 64 bits
  bool exempt = false;        // volatile, relaxed and ordered accesses are not checked for races
  bool negate_predicate = false;
  bool warpgroup_product = false;  // wgmma.mma_async
  int operation = 0;               // variant within a family: comparison, shuffle mode, atomic operation, ...
  int combine = 0;                 // setp: how the comparison is combined with a predicate
  std::array<int, 3> shape{};      // of a matrix instruction: m, n, k

  int mnemonic = 0;  // index into Program::mnemonics
  int line = 0;      // in the PTX text
  Source source;
  std::string text;
};

}  // namespace ptx
