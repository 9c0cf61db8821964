// The 16 barriers of a block.
#pragma once
#include <string>
#include <vector>

#include "race.h"

namespace ptx {

constexpr int BARRIERS = 16;

// Arrivals are counted in threads, a warp at a time.
class Barrier {
 public:
  // `expected` is 0 for "every warp of the block that has not ended". Returns what is wrong, or null.
  const char* arrive(const WarpClock& clock, int expected, bool predicate_all, bool predicate_any, int predicate_count);

  bool complete(int living_warps) const;
  bool in_use() const { return arrived_ > 0; }

  // Of all that arrived.
  const std::vector<Clock>& joined() const { return joined_; }
  bool all() const { return all_; }
  bool any() const { return any_; }
  int count() const { return count_; }

  void reset() { *this = {}; }

 private:
  int arrived_ = 0, expected_ = 0;
  std::vector<Clock> joined_;
  bool all_ = true, any_ = false;
  int count_ = 0;
};

}  // namespace ptx
