// Registers that wgmma uses beside the program: accumulators and operands of products in flight.
//
// Until the warp has waited for a product, its accumulators may be neither read nor written, and its operands in
// registers not written. What other instructions wrote to either is ordered before a product only by wgmma.fence.
#pragma once
#include <cstdint>
#include <vector>

#include "instruction.h"

namespace ptx {

class WarpgroupRegisters {
 public:
  void resize(size_t rows) { states_.assign(rows, WRITTEN); }
  bool watches() const { return !states_.empty(); }

  // Each returns what is wrong, or null.
  const char* execute(const Instruction& instruction);
  const char* issue(const Instruction& product);

  void fence();
  void nothing_in_flight();
  void in_flight(const Instruction& product);

 private:
  enum : uint8_t { WRITTEN = 1, ACCUMULATOR = 2, OPERAND = 4 };  // WRITTEN: since the last fence

  bool any(const std::vector<Row>& rows, uint8_t state) const;

  std::vector<uint8_t> states_;  // of each row
};

}  // namespace ptx
