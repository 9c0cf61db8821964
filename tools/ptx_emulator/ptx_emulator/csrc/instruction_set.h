// The instructions that the emulator knows, by base name and first type.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "operands.h"

namespace ptx {

// Reads the operands and chooses what executes the instruction. Throws UnsupportedError for a form it does not know.
using Decode = void (*)(const Mnemonic& mnemonic, Operands& operands, Instruction& instruction);

class InstructionSet {
 public:
  InstructionSet();

  void add(const std::string& base, const std::vector<Type>& types, Decode decode);
  void add(const std::string& base, Decode decode) { add(base, {Type::none}, decode); }

  // Throws UnsupportedError.
  Decode find(const Mnemonic& mnemonic) const;

  // "add.f32", "bar", ...: what the self-tests have to cover.
  std::vector<std::string> names() const;

 private:
  std::map<std::pair<std::string, Type>, Decode> decoders_;
};

const InstructionSet& instruction_set();

// One function per file in instructions/.
void add_arithmetic(InstructionSet& set);
void add_bits(InstructionSet& set);
void add_compare(InstructionSet& set);
void add_conversion(InstructionSet& set);
void add_move(InstructionSet& set);
void add_special_functions(InstructionSet& set);
void add_memory(InstructionSet& set);
void add_atomics(InstructionSet& set);
void add_exchange(InstructionSet& set);
void add_control(InstructionSet& set);
void add_async_copy(InstructionSet& set);
void add_matrix(InstructionSet& set);
void add_warpgroup_matrix(InstructionSet& set);

}  // namespace ptx
