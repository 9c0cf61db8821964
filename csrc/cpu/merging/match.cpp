// Matching. What it computes and how the work is split: cpu/merging/merge.h.
#include <algorithm>
#include <cfloat>
#include <utility>
#include <vector>

#include "cpu/merging/merge.h"

#define MLIP_BF16_VARIANT
#define MLIP_KERNELS "cpu/merging/match.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

#include "cpu/merging/match_products_kernels.h"

// How far a cosine of `products`, with lengths by `squares`, may lie from the one that is defined: roundings of the
// elements, of their products and sums, of both lengths, with |a| |b| = 1; and of the definition to float32.
template <typename A>
static A rounding_error(int64_t width) {
  const double roundings = 2.0 * double(width / LANES<A> + 9) + 9;
  return A(roundings * (sizeof(A) == 8 ? 0x1p-53 : 0x1p-24) + (sizeof(A) == 8 ? 0x1p-24 : 0));
}

// What is known of the best target of one source. `highest` is the highest approximate cosine so far, `second` the
// highest of another target.
template <typename A>
struct Best {
  A highest, second;
  Proposal proposal;
};

static inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Tokens of one side, a whole number of tiles: what fills the last one repeats a token, with a scale of NaN, which no
// comparison prefers.
template <typename A>
struct Tokens {
  int64_t count;
  const int64_t* index;  // in the sequence
  const void** vectors;
  A* scale;  // 1 / length
};

// Points `vectors` at the tokens as they are. Whether their lengths and products are far from the ends of the range.
template <typename T>
static bool point_at(const Similarities<T>& p, const T* sample, const Tail<T>& tail, int64_t padded,
                     Tokens<Accumulate<T>>& tokens) {
  bool ordinary = true;
  for (int64_t k = 0; k < padded; ++k) {
    const T* row = sample + tokens.index[k < tokens.count ? k : tokens.count - 1] * p.stride_token;
    tokens.vectors[k] = row;
    if (k >= tokens.count) {
      tokens.scale[k] = Accumulate<T>(NAN);
    } else if constexpr (sizeof(T) < 8) {
      const float sum = squares(row, p.width, tail);
      ordinary = ordinary && 0x1p-80f < sum && sum < 0x1p80f;
      tokens.scale[k] = 1 / std::sqrt(sum);
    }
  }
  return sizeof(T) < 8 && ordinary;
}

// Points `vectors` at copies of length 1.
template <typename T>
static MLIP_NOINLINE void point_at_directions(const Similarities<T>& p, const T* sample, int64_t padded,
                                              Accumulate<T>* copies, Tokens<Accumulate<T>>& tokens) {
  for (int64_t k = 0; k < padded; ++k) {
    const int64_t copy = k < tokens.count ? k : tokens.count - 1;
    tokens.vectors[k] = copies + copy * p.width;
    if (k >= tokens.count) continue;
    write_direction(sample + tokens.index[k] * p.stride_token, p.width, copies + k * p.width);
    tokens.scale[k] = 1;
  }
}

// Working memory of one thread.
template <typename T>
struct MatchRoom {
  using A = Accumulate<T>;
  int64_t sources, targets;  // sizes of a group and of a block, in whole tiles
  Scratch indices, vectors, scales, strips, norms, bests, copies;

  static int64_t block_of(const Similarities<T>& p) {
    const int64_t fitting = p.PANEL / p.row_bytes(), most = fitting < 16 ? 16 : fitting < 512 ? fitting : 512;
    return rounded_up(p.targets() < most ? p.targets() : most - most % MATCH_COLUMNS, MATCH_COLUMNS);
  }
  explicit MatchRoom(const Similarities<T>& p)
      : sources(rounded_up(p.group(), MATCH_ROWS)),
        targets(block_of(p)),
        indices(size_t(sources + p.targets()) * sizeof(int64_t), false),
        vectors(size_t(sources + targets) * sizeof(void*), false),
        scales(size_t(sources + targets * (1 + MATCH_ROWS)) * sizeof(A), false),
        strips(size_t(targets * MATCH_ROWS) * sizeof(A), false),
        norms(size_t(p.tokens) * sizeof(double), false),
        bests(size_t(sources) * sizeof(Best<A>), false),
        copies(size_t((sources + targets) * p.row_bytes()), false) {}
};

// Folds what a sweep over one block of targets found into what is known of MATCH_ROWS sources.
template <typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE void fold_sweep(const Similarities<T>& p, const T* sample, const Tokens<A>& sources,
                                     int64_t first_source, const Tokens<A>& targets, bool only_block,
                                     const Highest<A>& found, const A* strip, double* norms, Best<A>* best) {
  const A error = rounding_error<A>(p.width);
  for (int i = 0; i < MATCH_ROWS && first_source + i < sources.count; ++i) {
    Best<A>& known = best[first_source + i];
    const A scale = sources.scale[first_source + i];
    int64_t argmax = 0;
    for (int k = i; k < MATCH_PRODUCTS; k += MATCH_ROWS) {
      const A high = found.highest[k] * scale, next = found.second[k] * scale;
      if (high > known.highest) {
        known.second = known.highest < next ? next : known.highest;
        known.highest = high;
        argmax = found.tile[k] + k / MATCH_ROWS;
      } else if (high > known.second) {
        known.second = high;
      }
    }
    const auto target = [&](int64_t j) { return (targets.index[j] - p.first_target()) / 2; };
    const A least = known.highest - 2 * error;
    if (only_block && known.second < least) {
      known.proposal = {float(known.highest), sizeof(T) == 8 ? 0.0f : float(error), target(argmax)};
      continue;
    }
    // Rounding may have changed their order.
    for (int64_t j = 0; j < targets.count; ++j) {
      const A value = strip[j * MATCH_ROWS + i] * scale;
      if (!(value >= least)) continue;
      float cosine = float(value);
      if constexpr (sizeof(T) < 8) {
        const int64_t pair[2] = {sources.index[first_source + i], targets.index[j]};
        const T* row[2];
        for (int k = 0; k < 2; ++k) {
          row[k] = sample + pair[k] * p.stride_token;
          if (norms[pair[k]] < 0) norms[pair[k]] = length_of(row[k], p.width).norm;
        }
        cosine = exact_cosine(row[0], norms[pair[0]], row[1], norms[pair[1]], p.width);
      }
      if (cosine > known.proposal.similarity) known.proposal = {cosine, 0, target(j)};
    }
  }
}

// All sources with one block of targets, as vectors of E.
template <typename E, typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE void match_block(const Similarities<T>& p, const T* sample, const Tokens<A>& sources,
                                      const Tokens<A>& targets, bool only_block, MatchRoom<T>& room, A* scales,
                                      Ahead& ahead) {
  const Tail<E> tail(p.width);
  const auto *rows = reinterpret_cast<const E* const*>(sources.vectors),
             *columns = reinterpret_cast<const E* const*>(targets.vectors);
  A* strip = room.strips.template as<A>();
  for (int64_t j = 0; j < rounded_up(targets.count, MATCH_COLUMNS); ++j) {
    for (int i = 0; i < MATCH_ROWS; ++i) scales[j * MATCH_ROWS + i] = targets.scale[j];
  }
  for (int64_t i = 0; i < sources.count; i += MATCH_ROWS) {
    Highest<A> found;
    sweep_targets<E>(rows + i, columns, targets.count, p.width, tail, scales, strip, &found, ahead);
    fold_sweep(p, sample, sources, i, targets, only_block, found, strip, room.norms.template as<double>(),
               room.bests.template as<Best<A>>());
  }
}

template <typename T>
static void match_similarities(const Similarities<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t group = p.group();
  const Tail<T> tail(p.width);
  MatchRoom<T> room(p);
  const int64_t block = room.targets;
  auto* best = room.bests.template as<Best<A>>();
  auto* norms = room.norms.template as<double>();
  auto* source_index = room.indices.template as<int64_t>();
  int64_t* target_index = source_index + room.sources;
  auto* vectors = room.vectors.template as<const void*>();
  A *scales = room.scales.template as<A>(), *copies = room.copies.template as<A>();
  A* repeated_scale = scales + room.sources + room.targets;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), first = task % p.groups() * group;
    const int64_t last = first + group < p.sources() ? first + group : p.sources();
    const T* sample = p.metric + b * p.stride_batch;
    int64_t source_count = 0, target_count = 0;
    for (int64_t t = 0; t < p.targets(); ++t) {
      const int64_t n = p.first_target() + 2 * t;
      if (p.real(b, n)) target_index[target_count++] = n;
    }
    for (int64_t s = first; s < last; ++s) {
      const int64_t n = p.first_source() + 2 * s;
      p.proposals[b * p.sources() + s] = {-HUGE_VALF, 0, 0};
      if (p.real(b, n) && target_count > 0) source_index[source_count++] = n;
    }
    if (source_count == 0) continue;
    for (int64_t n = 0; n < p.tokens; ++n) norms[n] = -1;
    for (int64_t k = 0; k < source_count; ++k) best[k] = {A(-HUGE_VALF), A(-HUGE_VALF), {-HUGE_VALF, 0, 0}};

    Ahead ahead{reinterpret_cast<const char*>(sample), 0};
    if (p.read_ahead() && task + 1 < end) {
      const int64_t tiles =
          rounded_up(source_count, MATCH_ROWS) / MATCH_ROWS * (rounded_up(target_count, MATCH_COLUMNS) / MATCH_COLUMNS);
      const int64_t steps = tiles * (p.width / LANES<A>), bytes = p.tokens * p.width * int64_t(sizeof(T));
      if (bytes <= 64 * steps) ahead = {reinterpret_cast<const char*>(sample + p.stride_batch), bytes / steps};
    }
    Tokens<A> sources{source_count, source_index, vectors, scales};
    const int64_t padded = rounded_up(source_count, MATCH_ROWS);
    bool as_they_are = point_at(p, sample, tail, padded, sources);
    if (!as_they_are) point_at_directions(p, sample, padded, copies, sources);
    for (int64_t from = 0; from < target_count; from += block) {
      const int64_t count = target_count - from < block ? target_count - from : block;
      const int64_t padded_count = rounded_up(count, MATCH_COLUMNS);
      Tokens<A> targets{count, target_index + from, vectors + room.sources, scales + room.sources};
      const bool ordinary = point_at(p, sample, tail, padded_count, targets);
      if (as_they_are && ordinary) {
        match_block<T>(p, sample, sources, targets, count == target_count, room, repeated_scale, ahead);
        continue;
      }
      if (as_they_are) point_at_directions(p, sample, padded, copies, sources);
      as_they_are = false;
      point_at_directions(p, sample, padded_count, copies + room.sources * p.width, targets);
      match_block<A>(p, sample, sources, targets, count == target_count, room, repeated_scale, ahead);
    }
    for (int64_t k = 0; k < source_count; ++k) {
      p.proposals[b * p.sources() + (source_index[k] - p.first_source()) / 2] = best[k].proposal;
    }
  }
}

#else

// No floating-point sum is formed here, so one copy serves every machine.
namespace mlip::cpu {
namespace {

// By how much the guide lowers the score of a source; NaN as much as +inf.
double penalty(double guide, double weight) {
  const double product = guide * weight;
  if (std::isnan(product)) return DBL_MAX;
  return std::min(std::max(product, -DBL_MAX), DBL_MAX);
}

// Ordered by one bound of the scores, ties to the lower source.
struct Descending {
  const double* score;
  bool operator()(int64_t a, int64_t b) const { return score[a] != score[b] ? score[a] > score[b] : a < b; }
};

// Some sources, and the bounds between which the score of each lies.
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

// The defined cosine of two tokens of sample b.
using ExactCosine = float (*)(const Matching& problem, int64_t b, int64_t source, int64_t target);

template <typename T>
float exact_cosine_of(const Matching& problem, int64_t b, int64_t source, int64_t target) {
  MLIP_DISPATCH_ISA(exact_similarity<T>, static_cast<const Similarities<T>&>(problem), b, source, target);
}

// `exact` is null where the similarities of the proposals have no error.
void write_indices(const Matching& p, ExactCosine exact, int64_t begin, int64_t end) {
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
      if (exact != nullptr) {
        // A source above all but r, or below r others, needs no closer look.
        const double least = scores.highest(low, p.r), most = scores.highest(high, p.r + 1);
        for (const int64_t s : proposed) {
          if (low[s] == high[s] || high[s] < least || low[s] > most) continue;
          low[s] = high[s] = exact(p, b, source(s), target(proposals[s].target)) - less(s);
        }
      }
      std::nth_element(proposed.begin(), proposed.begin() + p.r, proposed.end(), Descending{low.data()});
      proposed.resize(p.r);
    }
    for (const int64_t s : proposed) chosen[s] = 1;

    // Prefix, unmerged sources, targets, padding, merged sources: what comes after the outputs starts none.
    int64_t position = 0;
    const auto append = [&](int64_t n) {
      assignment[n] = position;
      if (position < outputs) {
        kept[position] = n;
      } else {
        removed[position - outputs] = n;
      }
      ++position;
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

}  // namespace

template <typename T>
void match_similarities(const Similarities<T>& problem, int64_t begin, int64_t end) {
  MLIP_DISPATCH_ISA_BF16(T, match_similarities<T>, problem, begin, end);
}

template <typename T>
void match_indices(const Similarities<T>& problem, int64_t begin, int64_t end) {
  ExactCosine exact = nullptr;
  if constexpr (sizeof(T) < 8) exact = exact_cosine_of<T>;
  write_indices(problem, exact, begin, end);
}

#define MLIP_INSTANTIATE(T)                                                      \
  template void match_similarities<T>(const Similarities<T>&, int64_t, int64_t); \
  template void match_indices<T>(const Similarities<T>&, int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu

#endif  // MLIP_VECTOR_BYTES
