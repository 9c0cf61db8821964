#include "cpu/merging/merge.h"

#define MLIP_KERNELS "cpu/merging/merge_kernels.h"
#include "cpu/simd.h"

namespace mlip::cpu {
namespace {

constexpr const char* ASSIGNMENT_FAULT = "assignment: expected rows of the output, from 0 to N' - 1";

// Whether all of `rows` are in [0, limit): the sign of neither difference is set. Without a branch, it takes vectors.
bool inside(const int64_t* rows, int64_t count, int64_t limit) {
  uint64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) signs |= uint64_t(rows[i]) | (uint64_t(limit - 1) - uint64_t(rows[i]));
  return signs >> 63 == 0;
}

}  // namespace

template <typename T>
const char* merge_fault(const MergeRows<T>& p, int64_t begin, int64_t end) {
  const int64_t merged = p.tokens - p.outputs;
  Scratch memory(size_t(p.tokens), false);
  auto* named = memory.as<unsigned char>();
  for (int64_t b = begin; b < end; ++b) {
    const int64_t *kept = p.kept + b * p.outputs, *removed = p.removed + b * merged;
    const int64_t* assignment = p.assignment + b * p.tokens;
    if (!inside(assignment, p.tokens, p.outputs)) return ASSIGNMENT_FAULT;
    if (!inside(kept, p.outputs, p.tokens)) return "kept: expected rows of the input, from 0 to N - 1";
    if (!inside(removed, merged, p.tokens)) return "removed: expected rows of the input, from 0 to N - 1";
    std::memset(named, 0, size_t(p.tokens));
    int64_t apart = 0;
    for (int64_t o = 0; o < p.outputs; ++o) named[kept[o]] = 1, apart |= assignment[kept[o]] ^ o;
    for (int64_t k = 0; k < merged; ++k) named[removed[k]] = 1;
    if (apart != 0) return "assignment, kept: expected assignment[kept[o]] = o for every output row o";
    if (std::memchr(named, 0, size_t(p.tokens)) != nullptr) {
      return "kept, removed: expected every row of the input in one of them, once";
    }
  }
  return nullptr;
}

template <typename T>
const char* spread_fault(const MergeRows<T>& p, int64_t begin, int64_t end) {
  const int64_t block = p.block(), blocks = p.blocks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * block, rows = p.tokens - first < block ? p.tokens - first : block;
    if (!inside(p.assignment + task / blocks * p.tokens + first, rows, p.outputs)) return ASSIGNMENT_FAULT;
  }
  return nullptr;
}

template <typename T>
void merge_weights(const MergeRows<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t merged = p.tokens - p.outputs;
  const auto size = [&](int64_t b, int64_t n) { return p.size ? p.size[b * p.tokens + n] : 1.0f; };
  for (int64_t b = begin; b < end; ++b) {
    const int64_t *kept = p.kept + b * p.outputs, *removed = p.removed + b * merged;
    const int64_t* assignment = p.assignment + b * p.tokens;
    float* total = p.merged_size + b * p.outputs;
    A* weight = p.weight + b * p.tokens;
    const auto counted = [&](int64_t o) { return p.mask && !p.mask[b * p.outputs + o] ? 0.0f : size(b, kept[o]); };
    for (int64_t o = 0; o < p.outputs; ++o) total[o] = counted(o);
    for (int64_t k = 0; k < merged; ++k) {
      if (!p.lost(b, removed[k])) total[assignment[removed[k]]] += size(b, removed[k]);
    }
    for (int64_t o = 0; o < p.outputs; ++o) weight[kept[o]] = total[o] > 0 ? A(counted(o)) / A(total[o]) : A(1);
    for (int64_t k = 0; k < merged; ++k) {
      const int64_t n = removed[k];
      const float sum = total[assignment[n]];
      weight[n] = (p.lost(b, n) ? A(0) : A(size(b, n))) / (sum > 0 ? A(sum) : A(1));
    }
  }
}

template <typename T>
void combine_rows(const MergeRows<T>& problem, int64_t begin, int64_t end) {
  if (problem.channels == 0) return;  // such rows have no address that memcpy takes
  MLIP_DISPATCH_ISA(combine<T>, problem, begin, end);
}

template <typename T>
void spread_rows(const MergeRows<T>& problem, int64_t begin, int64_t end) {
  if (problem.channels == 0) return;  // such rows have no address that memcpy takes
  MLIP_DISPATCH_ISA(spread<T>, problem, begin, end);
}

#define MLIP_INSTANTIATE(T)                                                    \
  template const char* merge_fault<T>(const MergeRows<T>&, int64_t, int64_t);  \
  template const char* spread_fault<T>(const MergeRows<T>&, int64_t, int64_t); \
  template void merge_weights<T>(const MergeRows<T>&, int64_t, int64_t);       \
  template void combine_rows<T>(const MergeRows<T>&, int64_t, int64_t);        \
  template void spread_rows<T>(const MergeRows<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
