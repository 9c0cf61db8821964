// The r best proposals of a sample and the order of its output, by one block. Device code only.
//
// Scores are whole numbers of the same order here. The r-th highest is found bit by bit, each by counting how many
// sources reach it, so nothing is sorted and a sample may have any number of tokens; of sources that tie there, the
// lowest are taken. A token's place is then the number of tokens that come before it: by what becomes of them, then by
// position. The warps of the block own consecutive parts of the tokens and look at them twice, to count and to write.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/merging/match.h"

namespace mlip::cuda::merging {

// What becomes of a token, in the order of the output: a removed one starts no output row.
enum Fate { PREFIX, SOURCE, TARGET, PADDING, MERGED, FATES };

template <int WARPS>
struct Counts {
  int of[FATES][WARPS];
};

__device__ inline double guide_of(const Match& p, int64_t b, int n) {
  const int64_t at = b * p.guide_stride_batch + n * p.guide_stride_token;
  switch (p.guide_type) {
    case GuideType::float32:
      return static_cast<const float*>(p.guide)[at];
    case GuideType::float16:
      return widen(static_cast<const __half*>(p.guide)[at]);
    case GuideType::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(p.guide)[at]);
    default:
      return static_cast<const double*>(p.guide)[at];
  }
}

// The score of a source as a number of the same order, > 0; or 0 without a target. Of 32 bits where there is no guide.
__device__ inline uint64_t key_of(const Match& p, int64_t b, int n, float similarity) {
  if (similarity == -INFINITY) return 0;
  if (p.guide == nullptr) {
    const uint32_t bits = __float_as_uint(similarity + 0.0f);  // of both zeros the positive one
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  constexpr double LARGEST = 0x1.fffffffffffffp1023;
  double penalty = __dmul_rn(guide_of(p, b, n), p.guide_weight);
  penalty = isnan(penalty) ? LARGEST : fmin(fmax(penalty, -LARGEST), LARGEST);
  const double score = __dsub_rn(double(similarity), penalty) + 0.0;
  const uint64_t bits = uint64_t(__double_as_longlong(score));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// Which sources merge: those with a key above `least`, and of those that have this key the ones up to `last`.
struct Chosen {
  uint64_t least;
  int last;

  __device__ bool operator()(uint64_t key, int source) const {
    return key > least || (key == least && key != 0 && source <= last);
  }
};

// How many of 0 <= i < count satisfy `condition`, known to all threads of the block.
template <int THREADS, typename Condition>
__device__ inline int count_block(int count, Condition condition) {
  int total = 0;
#pragma unroll 1
  for (int from = 0; from < count; from += THREADS) {
    const int i = from + int(threadIdx.x);
    total += __syncthreads_count(i < count && condition(i));
  }
  return total;
}

// The r best of the sources, or all that have a target.
template <int THREADS>
__device__ inline Chosen choose_sources(const Match& p, const uint64_t* key) {
  const int sources = p.sources();
  uint64_t least = 0;
  for (uint64_t bit = p.guide ? uint64_t(1) << 63 : uint64_t(1) << 31; bit > 0; bit /= 2) {
    const uint64_t higher = least | bit;
    if (count_block<THREADS>(sources, [&](int s) { return key[s] >= higher; }) >= p.r) least = higher;
  }
  const int ties = p.r - count_block<THREADS>(sources, [&](int s) { return key[s] > least; });
  if (count_block<THREADS>(sources, [&](int s) { return key[s] == least; }) <= ties) return {least, sources};
  int last = 0;
  for (int bit = 1 << 30; bit > 0; bit /= 2) {
    const int higher = last | bit;
    if (bit <= sources && count_block<THREADS>(sources, [&](int s) { return key[s] == least && s < higher; }) < ties) {
      last = higher;
    }
  }
  return {least, last};
}

// Writes the maps of sample b, by all threads of a block. `best(s)` is the target of source s.
template <int WARPS, typename Best>
__device__ inline void write_maps(const Match& p, int64_t b, const uint64_t* key, Best best, Counts<WARPS>& counts) {
  constexpr int LANES = 32, THREADS = LANES * WARPS;
  const int thread = threadIdx.x, warp = thread / LANES, lane = thread % LANES;
  const int outputs = p.tokens - p.r, first_source = p.first_source();
  const Chosen chosen = choose_sources<THREADS>(p, key);
  const int part = (p.tokens + THREADS - 1) / THREADS * LANES;
  const int begin = warp * part, end = begin + part < p.tokens ? begin + part : p.tokens;
  const auto fate_of = [&](int n) {
    if (n >= end) return FATES;
    if (n < p.prefix) return PREFIX;
    if (!p.real(b, n)) return PADDING;
    if (n % 2) return TARGET;
    const int s = (n - first_source) / 2;
    return chosen(key[s], s) ? MERGED : SOURCE;
  };

  int found[FATES] = {};
#pragma unroll 1
  for (int from = begin; from < end; from += LANES) {
    const Fate fate = fate_of(from + lane);
#pragma unroll
    for (int f = 0; f < FATES; ++f) found[f] += __popc(__ballot_sync(~0u, fate == f));
  }
#pragma unroll
  for (int f = 0; f < FATES; ++f) {
    if (lane == 0) counts.of[f][warp] = found[f];
  }
  __syncthreads();  // counts are there

  int place[FATES];  // of the next token of each fate
  int before = 0;
#pragma unroll
  for (int f = 0; f < FATES; ++f) {
    place[f] = before;
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) {
      const int more = counts.of[f][w];
      if (w < warp) place[f] += more;
      before += more;
    }
  }
  int64_t* assignment = p.assignment + b * p.tokens;
#pragma unroll 1
  for (int from = begin; from < end; from += LANES) {
    const int n = from + lane;
    const Fate fate = fate_of(n);
    int own = 0;
#pragma unroll
    for (int f = 0; f < FATES; ++f) {
      const unsigned alike = __ballot_sync(~0u, fate == f);
      if (fate == f) own = place[f] + __popc(alike & ((1u << lane) - 1));
      place[f] += __popc(alike);
    }
    if (fate == FATES) continue;
    if (fate != MERGED) assignment[n] = own < outputs ? own : outputs - 1;
    if (own < outputs) {
      p.kept[b * outputs + own] = n;
    } else {
      p.removed[b * p.r + own - outputs] = n;
    }
    if (p.mask == nullptr) continue;
    if (own < outputs) p.merged_mask[b * outputs + own] = p.real(b, n);
    p.dropped[b * p.tokens + n] = fate != MERGED && own >= outputs;
  }
  __syncthreads();  // the places of targets are there
  for (int s = thread; s < p.sources(); s += THREADS) {
    const int n = first_source + 2 * s;
    if (chosen(key[s], s)) assignment[n] = assignment[p.first_target() + 2 * int64_t(best(s))];
  }
}

}  // namespace mlip::cuda::merging
