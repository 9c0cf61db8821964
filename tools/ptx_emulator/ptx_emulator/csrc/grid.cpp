#include "grid.h"

#include <algorithm>
#include <stdexcept>

#include "block.h"

namespace ptx {
namespace {

// The caller's buffers and the variables of the module.
std::vector<Buffer> all_buffers(Program& program, std::vector<Buffer> buffers) {
  for (auto& [name, variable] : program.variables) {
    std::memcpy(reinterpret_cast<void*>(variable.address), variable.initial.data(), variable.size);
    buffers.push_back({variable.address, variable.size, name, variable.writable, {}});
  }
  return buffers;
}

int smallest_access(const Kernel& kernel, Space space) {
  int smallest = 16;
  for (const Instruction& instruction : kernel.code) {
    const bool touches = instruction.space == space || instruction.space == Space::generic;
    if (instruction.access_bytes && touches) smallest = std::min(smallest, instruction.access_bytes);
  }
  return smallest;
}

}  // namespace

Grid::Grid(Program& program, const Kernel& kernel_, LaunchRequest request_, const Options& options_)
    : kernel(kernel_),
      request(std::move(request_)),
      options(options_),
      memory(all_buffers(program, std::move(request.buffers))),
      executed(program.mnemonics.size()),
      faults(kernel_, program, options_.max_faults),
      random(options_.seed) {
  const auto& block = request.block;
  if (*std::min_element(block.begin(), block.end()) < 1 || threads() > 1024 || block[2] > 64) {
    throw std::invalid_argument("block: expected at most 1024 threads, at most 64 along z");
  }
  const auto& grid = request.grid;
  if (*std::min_element(grid.begin(), grid.end()) < 1 || grid[1] > 65535 || grid[2] > 65535) {
    throw std::invalid_argument("grid: expected at least 1 block along each axis, at most 65535 along y and z");
  }
  if (request.parameters.size() != size_t(kernel.parameter_bytes)) {
    throw std::invalid_argument("parameters: " + kernel.name + " takes " + std::to_string(kernel.parameter_bytes) +
                                " bytes, got " + std::to_string(request.parameters.size()));
  }
  shared_bytes = request.dynamic_shared ? kernel.dynamic_shared_at + request.dynamic_shared : kernel.static_shared;
  shared_cell = smallest_access(kernel, Space::shared);
  global_cell = smallest_access(kernel, Space::global);
}

void Grid::run() {
  try {
    Block block(*this);
    for (int z = 0; z < request.grid[2]; ++z) {
      for (int y = 0; y < request.grid[1]; ++y) {
        for (int x = 0; x < request.grid[0]; ++x) block.run({x, y, z});
      }
    }
  } catch (const Stop&) {
    // what stopped it is among the faults
  }
}

}  // namespace ptx
