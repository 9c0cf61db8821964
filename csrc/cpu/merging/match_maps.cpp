// The r best proposals and the order of the output. No floating-point sum is in here, so one copy serves every machine.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "cpu/merging/match.h"

namespace mlip::cpu {
namespace {

// By how much the guide lowers the score of a source; NaN as much as +inf.
double penalty(double guide, double weight) {
  const double product = guide * weight;
  if (std::isnan(product)) return DBL_MAX;
  return std::min(std::max(product, -DBL_MAX), DBL_MAX);
}

// Ordered by what is known of two scores, ties to the lower source.
struct Descending {
  const double* score;
  bool operator()(int64_t a, int64_t b) const { return score[a] != score[b] ? score[a] > score[b] : a < b; }
};

// A number of sources, and the bounds between which the score of each lies.
struct Scores {
  std::vector<double> low, high;
  std::vector<int64_t> sources, order;

  // The k-th highest of some bounds, k >= 1.
  double highest(const std::vector<double>& bound, int64_t k) {
    order = sources;
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), Descending{bound.data()});
    return bound[order[k - 1]];
  }
};

}  // namespace

template <typename T>
void match_maps(const Similarities<T>& p, int64_t begin, int64_t end) {
  const int64_t sources = p.sources(), targets = p.targets(), outputs = p.tokens - p.r;
  Scores scores{std::vector<double>(sources), std::vector<double>(sources), {}, {}};
  auto& [low, high, proposed, order] = scores;
  std::vector<char> chosen(sources);

  for (int64_t b = begin; b < end; ++b) {
    const Proposal* proposals = p.proposals + b * sources;
    int64_t* assignment = p.assignment + b * p.tokens;
    int64_t *kept = p.kept + b * outputs, *removed = p.removed + b * p.r;
    const auto source = [&](int64_t s) { return p.first_source() + 2 * s; };
    const auto target = [&](int64_t t) { return p.first_target() + 2 * t; };

    const auto less = [&](int64_t s) {
      return p.guide ? penalty(p.guide[b * p.tokens + source(s)], p.guide_weight) : 0;
    };
    proposed.clear();
    for (int64_t s = 0; s < sources; ++s) {
      chosen[s] = 0;
      const Proposal& proposal = proposals[s];
      if (proposal.similarity == -HUGE_VALF) continue;
      low[s] = double(proposal.similarity) - proposal.error - less(s);
      high[s] = double(proposal.similarity) + proposal.error - less(s);
      proposed.push_back(s);
    }
    if (int64_t(proposed.size()) > p.r) {
      if constexpr (sizeof(T) < 8) {  // cosines of float64 have no error
        // Whoever lies above all but r, or below r others, needs no closer look.
        const double least = scores.highest(low, p.r), most = scores.highest(high, p.r + 1);
        for (const int64_t s : proposed) {
          if (low[s] == high[s] || high[s] < least || low[s] > most) continue;
          low[s] = high[s] = match_exactly(p, b, source(s), target(proposals[s].target)) - less(s);
        }
      }
      std::nth_element(proposed.begin(), proposed.begin() + p.r, proposed.end(), Descending{low.data()});
      proposed.resize(p.r);
    }
    for (const int64_t s : proposed) chosen[s] = 1;

    // Prefix, unmerged sources, targets, padding, merged sources: what comes after the outputs starts none.
    int64_t place = 0;
    const auto append = [&](int64_t n) {
      assignment[n] = place;
      if (place < outputs) {
        kept[place] = n;
      } else {
        removed[place - outputs] = n;
      }
      ++place;
    };
    for (int64_t n = 0; n < p.prefix; ++n) append(n);
    for (int64_t s = 0; s < sources; ++s) {
      if (!chosen[s] && p.real(b, source(s))) append(source(s));
    }
    for (int64_t t = 0; t < targets; ++t) {
      if (p.real(b, target(t))) append(target(t));
    }
    if (p.mask) {
      for (int64_t n = p.prefix; n < p.tokens; ++n) {
        if (!p.real(b, n)) append(n);
      }
    }
    for (int64_t s = 0; s < sources; ++s) {
      if (!chosen[s]) continue;
      append(source(s));
      assignment[source(s)] = assignment[target(proposals[s].target)];
    }
    if (!p.mask) continue;
    for (int64_t n = 0; n < p.tokens; ++n) {
      p.dropped[b * p.tokens + n] = assignment[n] >= outputs;
      assignment[n] = std::min(assignment[n], outputs - 1);
    }
    for (int64_t o = 0; o < outputs; ++o) p.merged_mask[b * outputs + o] = p.real(b, kept[o]);
  }
}

template void match_maps<float>(const Similarities<float>&, int64_t, int64_t);
template void match_maps<double>(const Similarities<double>&, int64_t, int64_t);
template void match_maps<BFloat16>(const Similarities<BFloat16>&, int64_t, int64_t);
template void match_maps<Half>(const Similarities<Half>&, int64_t, int64_t);

}  // namespace mlip::cpu
