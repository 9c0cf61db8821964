#include "cpu/contrastive/token_maxima_backward.h"

#include <algorithm>

#include "cpu/scratch.h"

namespace mlip::cpu {

// One coefficient times one token of the other side: `row` counts tokens from the first of the block.
template <typename A>
struct Term {
  A coefficient;
  int32_t row;
};

// How the work is cut, and the memory of one thread that it needs.
template <typename T>
struct BackwardCut {
  int64_t others;              // of the other side in a block: a slice of their tokens fits the second-level cache
  int64_t members;             // b at a time, as many as read a block before the next one takes its place
  Term<Accumulate<T>>* terms;  // [members, others * (N + M)]
  int32_t* ends;               // [members, N + 1] of the terms of each destination
  Accumulate<T>* sums;         // [members, N, D] where T is not what is accumulated in, else null
};

}  // namespace mlip::cpu

#define MLIP_KERNELS "cpu/contrastive/token_maxima_backward_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {
namespace {

constexpr int64_t OTHERS_BYTES = 512 << 10, TERMS_BYTES = 128 << 10, MOST_MEMBERS = 16;

}  // namespace

template <typename T>
static void run(const TokenMaximaBackward<T>& problem, const BackwardCut<T>& cut, int64_t begin, int64_t end) {
  MLIP_CALL(backward<T>, problem, cut, begin, end);
}

template <typename T>
void token_maxima_backward(const TokenMaximaBackward<T>& problem, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const auto at_least_one = [](int64_t number, int64_t most) { return std::clamp(number, int64_t(1), most); };
  const int64_t slice = std::min(problem.channels, problem.SLICE) * int64_t(sizeof(T));
  BackwardCut<T> cut{};
  cut.others = at_least_one(OTHERS_BYTES / (problem.other_count * slice), std::max(problem.other_batch, int64_t(1)));
  const int64_t terms = cut.others * (problem.count + problem.other_count);
  cut.members = at_least_one(TERMS_BYTES / (terms * int64_t(sizeof(Term<A>))), std::min(problem.batch, MOST_MEMBERS));
  Scratch term_memory(size_t(cut.members * terms) * sizeof(Term<A>), false);
  Scratch end_memory(size_t(cut.members * (problem.count + 1)) * sizeof(int32_t), false);
  const int64_t sums = std::is_same_v<T, A> ? 0 : cut.members * problem.count * problem.channels;
  Scratch sum_memory(size_t(sums) * sizeof(A), false);
  cut.terms = term_memory.as<Term<A>>();
  cut.ends = end_memory.as<int32_t>();
  cut.sums = std::is_same_v<T, A> ? nullptr : sum_memory.as<A>();
  run(problem, cut, begin, end);
}

#define MLIP_INSTANTIATE(T) template void token_maxima_backward<T>(const TokenMaximaBackward<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
