#include "cpu/contrastive/token_maxima_backward.h"

#include <algorithm>
#include <cstring>

namespace mlip::cpu {

// One coefficient times one token of the other side: `row` counts tokens from the first of the block.
template <typename A>
struct Term {
  A coefficient;
  int32_t row;
};

// The terms of one destination.
struct TermRange {
  int32_t begin, end;
};

// How the work is cut, and the memory of one thread that it needs.
template <typename T>
struct BackwardCut {
  int64_t others;              // of the other side in a block: a slice of their tokens fits the second-level cache
  int64_t members;             // b at a time, which read a block before the next one takes its place
  int64_t terms_of_member;     // at most, in a block
  Term<Accumulate<T>>* terms;  // [members, terms_of_member]
  TermRange* ranges;           // [members, N]
  int32_t* places;             // [others, N + M]: the maps of a block
  int32_t* next;               // [N]: where the next term of a destination goes
  Accumulate<T>* back;         // [M + 1] of a pair: coefficients of the M tokens, and 0
  Accumulate<T>* sums;         // [slices, members, N, SLICE], if there is more than one block
  T* slice;                    // [others * M + 1, SLICE]: far from each other, rows would share few places in the
                               // cache; the last row is 0
};

}  // namespace mlip::cpu

#define MLIP_KERNELS "cpu/contrastive/token_maxima_backward_kernels.h"
#include "cpu/simd.h"

namespace mlip::cpu {
namespace {

// The second-level cache, 1 MiB on many processors, is to hold a slice of the others and some sums; the terms of all
// members pass through it, once per slice.
constexpr int64_t SLICE_BYTES = 384 << 10, TERMS_BYTES = 768 << 10, SUMS_BYTES = 8 << 20, MOST_MEMBERS = 32;

template <typename T>
void run(const TokenMaximaBackward<T>& problem, const BackwardCut<T>& cut, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA(backward<T>, problem, cut, begin, end);
}

}  // namespace

template <typename T>
void token_maxima_backward(const TokenMaximaBackward<T>& problem, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t n = problem.count, m = problem.other_count;
  BackwardCut<T> cut{};
  const int64_t other_bytes = m * problem.SLICE * int64_t(sizeof(T));
  cut.others = std::max(int64_t(1), std::min(SLICE_BYTES / other_bytes, problem.other_batch));
  cut.terms_of_member = cut.others * (n + m) + n;
  const int64_t term_bytes = cut.terms_of_member * int64_t(sizeof(Term<A>));
  const bool keeps_sums = cut.others < problem.other_batch;
  const int64_t sums = keeps_sums ? n * problem.slices() * problem.SLICE : 0, sum_bytes = sums * int64_t(sizeof(A));
  cut.members =
      std::min({problem.batch, MOST_MEMBERS, TERMS_BYTES / term_bytes, SUMS_BYTES / std::max(sum_bytes, int64_t(1))});
  cut.members = std::max(cut.members, int64_t(1));

  Scratch term_memory(size_t(cut.members * cut.terms_of_member) * sizeof(Term<A>), false);
  Scratch range_memory(size_t(cut.members * n) * sizeof(TermRange), false);
  Scratch place_memory(size_t(cut.others * (n + m)) * sizeof(int32_t), false);
  Scratch next_memory(size_t(n) * sizeof(int32_t), false);
  Scratch back_memory(size_t(m + 1) * sizeof(A), false);
  Scratch sum_memory(size_t(cut.members * sum_bytes), false);
  Scratch slice_memory(size_t((cut.others * m + 1) * problem.SLICE) * sizeof(T), false);
  cut.terms = term_memory.as<Term<A>>();
  cut.ranges = range_memory.as<TermRange>();
  cut.places = place_memory.as<int32_t>();
  cut.next = next_memory.as<int32_t>();
  cut.back = back_memory.as<A>();
  cut.sums = sum_memory.as<A>();
  cut.slice = slice_memory.as<T>();
  std::memset(static_cast<void*>(cut.slice + cut.others * m * problem.SLICE), 0, size_t(problem.SLICE) * sizeof(T));
  run(problem, cut, begin, end);
}

#define MLIP_INSTANTIATE(T) template void token_maxima_backward<T>(const TokenMaximaBackward<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
