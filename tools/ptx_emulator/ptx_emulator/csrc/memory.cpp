#include "memory.h"

#include <algorithm>

namespace ptx {

GlobalMemory::GlobalMemory(std::vector<Buffer> buffers) : buffers_(std::move(buffers)) {
  std::sort(buffers_.begin(), buffers_.end(), [](const Buffer& a, const Buffer& b) { return a.address < b.address; });
}

Buffer* GlobalMemory::find(uint64_t address, int bytes) {
  if (last_ && last_->holds(address, bytes)) return last_;
  auto after = std::upper_bound(buffers_.begin(), buffers_.end(), address,
                                [](uint64_t wanted, const Buffer& buffer) { return wanted < buffer.address; });
  if (after == buffers_.begin() || !(--after)->holds(address, bytes)) return nullptr;
  return last_ = &*after;
}

const Buffer* GlobalMemory::nearest(uint64_t address) const {
  const Buffer* best = nullptr;
  uint64_t least = ~uint64_t(0);
  for (const Buffer& buffer : buffers_) {
    const uint64_t distance = address < buffer.address ? buffer.address - address : address - buffer.address;
    const uint64_t beyond = address < buffer.address ? distance : distance - std::min(distance, buffer.size);
    if (beyond < least) {
      least = beyond;
      best = &buffer;
    }
  }
  return best;
}

}  // namespace ptx
