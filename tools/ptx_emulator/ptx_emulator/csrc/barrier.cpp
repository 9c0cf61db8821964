#include "barrier.h"

#include <algorithm>

namespace ptx {

const char* Barrier::arrive(const WarpClock& clock, int expected, bool predicate_all, bool predicate_any,
                            int predicate_count) {
  const char* wrong = nullptr;
  if (expected % WARP_SIZE) wrong = "the number of threads is not a multiple of the warp size";
  if (arrived_ && expected != expected_) wrong = "warps arrive with different numbers of threads";
  expected_ = expected;
  arrived_ += WARP_SIZE;
  if (expected_ && arrived_ > expected_) wrong = "more threads arrive than were announced";
  joined_.resize(clock.of.size());
  for (size_t w = 0; w < joined_.size(); ++w) joined_[w] = std::max(joined_[w], clock.of[w]);
  all_ = all_ && predicate_all;
  any_ = any_ || predicate_any;
  count_ += predicate_count;
  return wrong;
}

bool Barrier::complete(int living_warps) const {
  return arrived_ > 0 && arrived_ >= (expected_ ? expected_ : living_warps * WARP_SIZE);
}

}  // namespace ptx
