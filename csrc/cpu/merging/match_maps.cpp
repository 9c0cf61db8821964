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

}  // namespace

void match_maps(const Matching& p, int64_t begin, int64_t end) {
  const int64_t sources = p.sources(), targets = p.targets(), outputs = p.tokens - p.r;
  std::vector<double> score(sources);
  std::vector<int64_t> proposals(sources);
  std::vector<char> chosen(sources);

  for (int64_t b = begin; b < end; ++b) {
    const float* similarity = p.similarity + b * sources;
    int64_t* assignment = p.assignment + b * p.tokens;
    int64_t *kept = p.kept + b * outputs, *removed = p.removed + b * p.r;
    const auto source = [&](int64_t s) { return p.first_source() + 2 * s; };
    const auto target = [&](int64_t t) { return p.first_target() + 2 * t; };

    proposals.clear();
    for (int64_t s = 0; s < sources; ++s) {
      chosen[s] = 0;
      if (similarity[s] == -HUGE_VALF) continue;
      score[s] = similarity[s];
      if (p.guide) score[s] -= penalty(p.guide[b * p.tokens + source(s)], p.guide_weight);
      if (score[s] > -HUGE_VAL) proposals.push_back(s);
    }
    if (int64_t(proposals.size()) > p.r) {
      const auto before = [&](int64_t a, int64_t c) { return score[a] != score[c] ? score[a] > score[c] : a < c; };
      std::nth_element(proposals.begin(), proposals.begin() + p.r, proposals.end(), before);
      proposals.resize(p.r);
    }
    for (const int64_t s : proposals) chosen[s] = 1;

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
      assignment[source(s)] = assignment[target(p.best[b * sources + s])];
    }
    if (!p.mask) continue;
    for (int64_t n = 0; n < p.tokens; ++n) {
      p.dropped[b * p.tokens + n] = assignment[n] >= outputs;
      assignment[n] = std::min(assignment[n], outputs - 1);
    }
    for (int64_t o = 0; o < outputs; ++o) p.merged_mask[b * outputs + o] = p.real(b, kept[o]);
  }
}

}  // namespace mlip::cpu
