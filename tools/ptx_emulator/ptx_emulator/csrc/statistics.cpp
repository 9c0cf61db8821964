#include "statistics.h"

#include <algorithm>

#include "memory.h"

namespace ptx {
namespace {

// The number of different 32-byte sectors that the lanes touch.
uint64_t count_sectors(const uint64_t* address, Mask mask, int bytes) {
  uint64_t sectors[WARP_SIZE * 3];
  int count = 0;
  bool ascending = true;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const uint64_t first = address[__builtin_ctz(rest)];
    for (uint64_t s = first / SECTOR; s <= (first + uint64_t(bytes) - 1) / SECTOR; ++s) {
      if (count && sectors[count - 1] == s) continue;
      ascending = ascending && (count == 0 || sectors[count - 1] < s);
      sectors[count++] = s;
    }
  }
  if (ascending) return uint64_t(count);
  std::sort(sectors, sectors + count);
  return uint64_t(std::unique(sectors, sectors + count) - sectors);
}

// Whether no bank is asked for two different words.
bool is_free_of_conflicts(const uint64_t* address, Mask mask, int bytes) {
  uint32_t word_of[32], used = 0;
  for (; mask; mask &= mask - 1) {
    const uint64_t first = address[__builtin_ctz(mask)];
    for (int b = 0; b < std::max(bytes, 4); b += 4) {
      const uint32_t word = uint32_t((first + uint64_t(b)) / 4), bank = word % 32;
      if ((used >> bank & 1) && word_of[bank] != word) return false;
      used |= 1u << bank;
      word_of[bank] = word;
    }
  }
  return true;
}

// The most different 4-byte words that fall into one of the 32 banks, over the lanes that are served together.
uint64_t count_waves(const uint64_t* address, Mask mask, int bytes) {
  if (is_free_of_conflicts(address, mask, bytes)) return 1;
  uint32_t words[32][32];
  int used[32] = {};
  int most = 0;
  for (; mask; mask &= mask - 1) {
    const uint64_t first = address[__builtin_ctz(mask)];
    for (int b = 0; b < std::max(bytes, 4); b += 4) {
      const uint32_t word = uint32_t((first + uint64_t(b)) / 4), bank = word % 32;
      uint32_t* const end = words[bank] + used[bank];
      if (std::find(words[bank], end, word) != end) continue;
      *end = word;
      most = std::max(most, ++used[bank]);
    }
  }
  return uint64_t(most);
}

}  // namespace

void Statistics::count_global(GlobalMemory& memory, const uint64_t* address, Mask mask, int bytes, bool store) {
  if (!mask) return;
  const uint64_t total = uint64_t(__builtin_popcount(mask)) * uint64_t(bytes);
  const uint64_t sectors = count_sectors(address, mask, bytes), ideal = (total + SECTOR - 1) / SECTOR;
  (store ? global_store_requests : global_load_requests) += 1;
  (store ? global_store_sectors : global_load_sectors) += sectors;
  (store ? global_store_ideal_sectors : global_load_ideal_sectors) += ideal;
  (store ? global_store_bytes : global_load_bytes) += total;
  count_distinct(memory, address, mask, bytes, store);
}

// What lies outside every buffer is a fault, and not counted.
void Statistics::count_distinct(GlobalMemory& memory, const uint64_t* address, Mask mask, int bytes, bool store) {
  uint64_t& distinct = store ? global_store_distinct_sectors : global_load_distinct_sectors;
  uint64_t* touched = nullptr;
  const Buffer* buffer = nullptr;
  uint64_t before = ~uint64_t(0);
  for (; mask; mask &= mask - 1) {
    const uint64_t first = address[__builtin_ctz(mask)];
    if (!buffer || !buffer->holds(first, bytes)) {
      Buffer* const found = memory.find(first, bytes);
      buffer = found;
      before = ~uint64_t(0);
      if (!found) continue;
      std::vector<uint64_t>& sectors = store ? found->sectors_written : found->sectors_read;
      if (sectors.empty()) {
        sectors.resize((found->size / SECTOR + 2 + 63) / 64);
        ++(store ? global_store_buffers : global_load_buffers);
      }
      touched = sectors.data();
    }
    const uint64_t begin = buffer->address / SECTOR;
    for (uint64_t s = first / SECTOR - begin; s <= (first + uint64_t(bytes) - 1) / SECTOR - begin; ++s) {
      if (s == before) continue;
      before = s;
      const uint64_t bit = uint64_t(1) << s % 64;
      distinct += (touched[s / 64] & bit) == 0;
      touched[s / 64] |= bit;
    }
  }
}

// Accesses of 8 and 16 bytes are served for half and a quarter of the warp at a time.
void Statistics::count_shared(const uint64_t* address, Mask mask, int bytes, bool store) {
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint64_t waves = 0;
  for (int first = 0; first < WARP_SIZE; first += together) {
    const Mask group = mask & (together == 32 ? ALL_LANES : ((Mask(1) << together) - 1) << first);
    if (group) waves += count_waves(address, group, bytes);
  }
  (store ? shared_store_requests : shared_load_requests) += 1;
  (store ? shared_store_waves : shared_load_waves) += waves;
}

std::vector<std::pair<const char*, uint64_t>> Statistics::named() const {
#define MLIP_FIELD(name) \
  {                      \
    #name, name          \
  }
  return {MLIP_FIELD(warp_instructions),
          MLIP_FIELD(lane_instructions),
          MLIP_FIELD(divergent),
          MLIP_FIELD(barriers),
          MLIP_FIELD(atomics),
          MLIP_FIELD(global_load_requests),
          MLIP_FIELD(global_load_sectors),
          MLIP_FIELD(global_load_ideal_sectors),
          MLIP_FIELD(global_load_bytes),
          MLIP_FIELD(global_store_requests),
          MLIP_FIELD(global_store_sectors),
          MLIP_FIELD(global_store_ideal_sectors),
          MLIP_FIELD(global_store_bytes),
          MLIP_FIELD(global_load_distinct_sectors),
          MLIP_FIELD(global_load_buffers),
          MLIP_FIELD(global_store_distinct_sectors),
          MLIP_FIELD(global_store_buffers),
          MLIP_FIELD(async_copy_bytes),
          MLIP_FIELD(shared_load_requests),
          MLIP_FIELD(shared_load_waves),
          MLIP_FIELD(shared_store_requests),
          MLIP_FIELD(shared_store_waves),
          MLIP_FIELD(matrix_instructions),
          MLIP_FIELD(matrix_macs),
          MLIP_FIELD(duplicate_stores)};
#undef MLIP_FIELD
}

}  // namespace ptx
