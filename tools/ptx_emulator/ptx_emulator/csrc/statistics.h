// What a launch did: instructions, memory traffic as the hardware would split it, tensor-core work.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "instruction.h"

namespace ptx {

class GlobalMemory;

constexpr int SECTOR = 32;  // bytes: the unit in which global memory moves

struct Statistics {
  uint64_t warp_instructions = 0, lane_instructions = 0, divergent = 0, barriers = 0, atomics = 0;
  uint64_t global_load_requests = 0, global_load_sectors = 0, global_load_ideal_sectors = 0, global_load_bytes = 0;
  uint64_t global_store_requests = 0, global_store_sectors = 0, global_store_ideal_sectors = 0, global_store_bytes = 0;
  // Each sector of a buffer once, however often it is asked for; buffers of which any is.
  uint64_t global_load_distinct_sectors = 0, global_load_buffers = 0;
  uint64_t global_store_distinct_sectors = 0, global_store_buffers = 0;
  uint64_t async_copy_bytes = 0;
  uint64_t shared_load_requests = 0, shared_load_waves = 0, shared_store_requests = 0, shared_store_waves = 0;
  uint64_t matrix_instructions = 0, matrix_macs = 0, duplicate_stores = 0;

  // One access of `bytes` by each lane in `mask`, at `address[lane]`.
  void count_global(GlobalMemory& memory, const uint64_t* address, Mask mask, int bytes, bool store);
  void count_shared(const uint64_t* address, Mask mask, int bytes, bool store);

  std::vector<std::pair<const char*, uint64_t>> named() const;

 private:
  void count_distinct(GlobalMemory& memory, const uint64_t* address, Mask mask, int bytes, bool store);
};

}  // namespace ptx
