// What the decoder of an instruction sees of the text: its mnemonic, taken apart, and its operands, one after another.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "instruction.h"

namespace ptx {

// `mad.wide.s32` is base `mad`, modifiers `wide` and `s32`, types s32.
struct Mnemonic {
  explicit Mnemonic(const std::string& text);

  bool has(const std::string& modifier) const;
  // The index of the first of `names` that is a modifier.
  std::optional<int> one_of(const std::vector<std::string>& names) const;
  // Reads a shape such as m16n8k16.
  std::optional<std::array<int, 3>> shape() const;

  std::string text, base;
  std::vector<std::string> modifiers;
  std::vector<Type> types;
};

class Operands {
 public:
  virtual ~Operands() = default;

  virtual Row row() = 0;                      // a register, an immediate, a special register, an address of a variable
  virtual std::vector<Row> rows() = 0;        // {a, b, ...} or one row
  virtual Address address(Space* space) = 0;  // [register + offset]; `space` becomes param for a parameter
  virtual int immediate() = 0;                // an integer that must stand in the text
  virtual bool accept(const char* token) = 0;
  virtual void expect(const char* token) = 0;
  virtual bool next_is(const char* token) = 0;
  virtual std::string label() = 0;
  // Immediates are read as this type from now on: `1.0` is a different constant in f32 and f64.
  virtual void immediates_are(Type type) = 0;
  virtual bool is_predicate(Row row) const = 0;
  virtual bool has_64_bits(Row row) const = 0;  // by the register's declaration
  virtual void skip_rest() = 0;                 // of the instruction

  // d, s1, ..., sn
  void destination_and_sources(Instruction& instruction, int sources) {
    instruction.destinations.push_back(row());
    expect(",");
    this->sources(instruction, sources);
  }
  void sources(Instruction& instruction, int count) {
    for (int i = 0; i < count; ++i) {
      if (i) expect(",");
      instruction.sources.push_back(row());
    }
  }
};

}  // namespace ptx
