// A parsed PTX text.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "instruction.h"

namespace ptx {

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  smid,
  nsmid,
  dynamic_shared_size,
  total_shared_size,
  zero,
  one,
};

struct Parameter {
  std::string name;
  int offset = 0, size = 0;
  Type type = Type::none;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<Instruction> code;
  int rows = 0;                                      // of the register file, for each warp
  std::vector<std::pair<Row, uint64_t>> immediates;  // rows that hold a constant
  std::vector<std::pair<Row, Special>> special;      // rows that hold a special register
  int static_shared = 0, local_bytes = 0;
  int dynamic_shared_at = 0;  // where dynamic shared memory starts
  std::string unsupported;    // why the kernel cannot run; empty if it can
};

// A variable of module scope in global or constant memory.
struct Variable {
  std::string name;
  std::unique_ptr<uint8_t[]> storage;
  uint64_t address = 0, size = 0;
  bool writable = true;
  std::vector<uint8_t> initial;  // restored before each launch of a fresh module
};

struct Program {
  Program() = default;
  Program(Program&&) = default;

  std::map<std::string, Kernel> kernels;
  std::map<std::string, Variable> variables;
  std::vector<std::string> mnemonics;
  std::map<int, std::string> files;  // of .file
};

}  // namespace ptx
