#include "warpgroup_registers.h"

#include <algorithm>

namespace ptx {
namespace {

// {a0, a1, a2, a3}, descriptor of B, accumulate; or two descriptors, accumulate
bool a_is_in_registers(const Instruction& product) { return product.sources.size() > 3; }

}  // namespace

bool WarpgroupRegisters::any(const std::vector<Row>& rows, uint8_t state) const {
  return std::any_of(rows.begin(), rows.end(), [&](Row row) { return (states_[size_t(row)] & state) != 0; });
}

const char* WarpgroupRegisters::execute(const Instruction& instruction) {
  if (instruction.warpgroup_product) return issue(instruction);
  const char* wrong = nullptr;
  if (any(instruction.sources, ACCUMULATOR)) wrong = "a register is read that a wgmma in flight will write";
  if (any(instruction.destinations, ACCUMULATOR | OPERAND)) wrong = "a register is written that a wgmma in flight uses";
  for (const Row row : instruction.destinations) states_[size_t(row)] |= WRITTEN;
  return wrong;
}

const char* WarpgroupRegisters::issue(const Instruction& product) {
  const size_t operands = a_is_in_registers(product) ? product.sources.size() - 2 : 0;
  const std::vector<Row> a(product.sources.begin(), product.sources.begin() + long(operands));
  const char* wrong = nullptr;
  if (any(a, ACCUMULATOR)) wrong = "an operand is read that a wgmma in flight will write";
  if (any(product.destinations, WRITTEN) || any(a, WRITTEN)) {
    wrong = "registers of the wgmma were written since the last wgmma.fence";
  }
  in_flight(product);
  return wrong;
}

void WarpgroupRegisters::fence() {
  for (uint8_t& state : states_) state &= uint8_t(~WRITTEN);
}

void WarpgroupRegisters::nothing_in_flight() {
  for (uint8_t& state : states_) state &= WRITTEN;
}

void WarpgroupRegisters::in_flight(const Instruction& product) {
  for (const Row row : product.destinations) states_[size_t(row)] |= ACCUMULATOR;
  if (!a_is_in_registers(product)) return;
  for (size_t n = 0; n + 2 < product.sources.size(); ++n) states_[size_t(product.sources[n])] |= OPERAND;
}

}  // namespace ptx
