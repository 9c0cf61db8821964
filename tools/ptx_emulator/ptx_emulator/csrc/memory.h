// Buffers in global memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "race.h"

namespace ptx {

struct Buffer {
  uint64_t address = 0, size = 0;
  std::string name;
  bool writable = true;
  GlobalShadow shadow;
  std::vector<uint64_t> sectors_read = {}, sectors_written = {};  // a bit for each 32 bytes; empty until one is touched

  bool holds(uint64_t begin, int bytes) const { return begin >= address && begin + uint64_t(bytes) <= address + size; }
};

// What a kernel may touch; everything else is out of bounds.
class GlobalMemory {
 public:
  explicit GlobalMemory(std::vector<Buffer> buffers);

  Buffer* find(uint64_t address, int bytes);
  // The buffer that an access out of bounds was probably meant for.
  const Buffer* nearest(uint64_t address) const;

 private:
  std::vector<Buffer> buffers_;  // by address
  Buffer* last_ = nullptr;
};

}  // namespace ptx
