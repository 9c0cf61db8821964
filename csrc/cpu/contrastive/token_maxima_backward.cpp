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
  int64_t members;             // b at a time, which read a block before the next one takes its place
  Term<Accumulate<T>>* terms;  // [members, others * (N + M)]
  int32_t* ends;               // [members, N + 1] of the terms of each destination
  int32_t* places;             // [N + M] of a pair
  Accumulate<T>* sums;         // [slices, members, N, SLICE], the last slice rounded up to whole pairs of vectors
  T* slice;                    // [others, M, SLICE]: far from each other, rows would share few places in the cache
};

}  // namespace mlip::cpu

#define MLIP_KERNELS "cpu/contrastive/token_maxima_backward_kernels.h"
#include "cpu/simd_copies.h"

namespace mlip::cpu {
namespace {

constexpr int64_t SLICE_BYTES = 256 << 10, TERMS_BYTES = 128 << 10, MOST_MEMBERS = 16;
constexpr int64_t PAIR = 32;  // channels in two of the longest vectors

int64_t between(int64_t least, int64_t number, int64_t most) { return std::max(least, std::min(number, most)); }

template <typename T>
void run(const TokenMaximaBackward<T>& problem, const BackwardCut<T>& cut, int64_t begin, int64_t end) {
  MLIP_CALL(backward<T>, problem, cut, begin, end);
}

}  // namespace

template <typename T>
void token_maxima_backward(const TokenMaximaBackward<T>& problem, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t channels = (problem.channels + PAIR - 1) / PAIR * PAIR;
  const int64_t other = problem.other_count * std::min(channels, problem.SLICE);
  BackwardCut<T> cut{};
  cut.others = between(1, SLICE_BYTES / (other * int64_t(sizeof(T))), problem.other_batch);
  const int64_t terms = cut.others * (problem.count + problem.other_count);
  const int64_t most = std::min(problem.batch, MOST_MEMBERS);
  cut.members = between(1, TERMS_BYTES / (terms * int64_t(sizeof(Term<A>))), most);

  Scratch term_memory(size_t(cut.members * terms) * sizeof(Term<A>), false);
  Scratch end_memory(size_t(cut.members * (problem.count + 1)) * sizeof(int32_t), false);
  Scratch place_memory(size_t(problem.count + problem.other_count) * sizeof(int32_t), false);
  Scratch sum_memory(size_t(cut.members * problem.count * channels) * sizeof(A), false);
  Scratch slice_memory(size_t(cut.others * other) * sizeof(T), false);
  cut.terms = term_memory.as<Term<A>>();
  cut.ends = end_memory.as<int32_t>();
  cut.places = place_memory.as<int32_t>();
  cut.sums = sum_memory.as<A>();
  cut.slice = slice_memory.as<T>();
  run(problem, cut, begin, end);
}

#define MLIP_INSTANTIATE(T) template void token_maxima_backward<T>(const TokenMaximaBackward<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
