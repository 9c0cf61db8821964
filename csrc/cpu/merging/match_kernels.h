// Compiled once per instruction set (cpu/simd.h). What it computes and how the work is split: cpu/merging/match.h.

#include "cpu/merging/match_products_kernels.h"

typedef float HalfOfFloats __attribute__((vector_size(MLIP_VECTOR_BYTES / 2)));

static inline void widen(Vector<float> v, Vector<double>* wide) {
  HalfOfFloats halves[2];
  std::memcpy(halves, &v, sizeof v);
  for (int h = 0; h < 2; ++h) wide[h] = __builtin_convertvector(halves[h], Vector<double>);
}

// <a, b> in float64, where squares of float32 can neither overflow nor vanish.
template <typename T>
static double exact_product(const T* a, const T* b, int64_t width) {
  constexpr int STEP = LANES<float>;
  Vector<double> sums[4] = {}, wide_a[2], wide_b[2];
  int64_t d = 0;
  for (; d + 2 * STEP <= width; d += 2 * STEP) {
    for (int k = 0; k < 2; ++k) {
      widen(load(a + d + k * STEP), wide_a);
      widen(load(b + d + k * STEP), wide_b);
      for (int h = 0; h < 2; ++h) sums[2 * k + h] += wide_a[h] * wide_b[h];
    }
  }
  for (; d < width; d += STEP) {
    const int64_t count = width - d < STEP ? width - d : STEP;
    widen(load(a + d, count), wide_a);
    widen(load(b + d, count), wide_b);
    for (int h = 0; h < 2; ++h) sums[h] += wide_a[h] * wide_b[h];
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Length of a vector, over its largest element for float64, whose squares may leave the range; `norm` is 0 where the
// vector has no direction: it is zero, or not finite.
struct Length {
  double norm, largest;
};

template <typename T>
static Length length_of(const T* row, int64_t width) {
  Length length{0, 1};
  if constexpr (sizeof(T) == 8) {
    double largest = 0, squares = 0;
    for (int64_t d = 0; d < width; ++d) largest = largest < std::fabs(row[d]) ? std::fabs(row[d]) : largest;
    length.largest = largest > 0 ? largest : 1;
    for (int64_t d = 0; d < width; ++d) squares += (row[d] / length.largest) * (row[d] / length.largest);
    length.norm = std::sqrt(squares);
  } else {
    length.norm = std::sqrt(exact_product(row, row, width));
  }
  if (!(length.norm > 0 && length.norm < HUGE_VAL)) length.norm = 0;
  return length;
}

// The cosine as it is defined, of two vectors of these lengths.
template <typename T>
static float exact_cosine(const T* a, double norm_a, const T* b, double norm_b, int64_t width) {
  const double norms = norm_a * norm_b;
  return norms > 0 ? float(exact_product(a, b, width) / norms) : 0.0f;
}

template <typename T>
static float exact_similarity(const Similarities<T>& p, int64_t b, int64_t source, int64_t target) {
  const T* from = p.metric + b * p.stride_batch;
  const T* one = from + source * p.stride_token;
  const T* two = from + target * p.stride_token;
  return exact_cosine(one, length_of(one, p.width).norm, two, length_of(two, p.width).norm, p.width);
}

// to[d] = row[d] / its length, zeros where it has no direction.
template <typename T, typename A = Accumulate<T>>
static void write_direction(const T* row, int64_t width, A* to) {
  const Length length = length_of(row, width);
  if (length.norm == 0) {
    std::memset(to, 0, size_t(width) * sizeof(A));
    return;
  }
  for (int64_t d = 0; d < width; d += LANES<A>) {
    const int64_t count = width - d < LANES<A> ? width - d : LANES<A>;
    const Vector<A> v = load(row + d, count);
    if constexpr (sizeof(T) == 8) {
      store(to + d, v / length.largest / length.norm, count);
    } else {
      Vector<double> wide[2];
      widen(v, wide);
      HalfOfFloats halves[2];
      for (int h = 0; h < 2; ++h) halves[h] = __builtin_convertvector(wide[h] / length.norm, HalfOfFloats);
      Vector<A> narrow;
      std::memcpy(&narrow, halves, sizeof narrow);
      store(to + d, narrow, count);
    }
  }
}

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
  const int64_t* number;  // in the sequence
  const void** vectors;
  A* scale;  // 1 / length
};

// Points `vectors` at the tokens as they are. Whether their lengths and products are far from the ends of the range.
template <typename T>
static bool point_at(const Similarities<T>& p, const T* sample, const Tail<T>& tail, int64_t padded,
                     Tokens<Accumulate<T>>& tokens) {
  bool ordinary = true;
  for (int64_t k = 0; k < padded; ++k) {
    const T* row = sample + tokens.number[k < tokens.count ? k : tokens.count - 1] * p.stride_token;
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
static void point_at_directions(const Similarities<T>& p, const T* sample, int64_t padded, Accumulate<T>* copies,
                                Tokens<Accumulate<T>>& tokens) {
  for (int64_t k = 0; k < padded; ++k) {
    const int64_t copy = k < tokens.count ? k : tokens.count - 1;
    tokens.vectors[k] = copies + copy * p.width;
    if (k >= tokens.count) continue;
    write_direction(sample + tokens.number[k] * p.stride_token, p.width, copies + k * p.width);
    tokens.scale[k] = 1;
  }
}

// Working memory of one thread.
template <typename T>
struct MatchRoom {
  using A = Accumulate<T>;
  int64_t sources, targets;  // sizes of a group and of a block, in whole tiles
  Scratch numbers, vectors, scales, strips, norms, bests, copies;

  static int64_t block_of(const Similarities<T>& p) {
    const int64_t fitting = p.PANEL / p.row_bytes(), most = fitting < 16 ? 16 : fitting < 512 ? fitting : 512;
    return rounded_up(p.targets() < most ? p.targets() : most - most % MATCH_COLUMNS, MATCH_COLUMNS);
  }
  explicit MatchRoom(const Similarities<T>& p)
      : sources(rounded_up(p.group(), MATCH_ROWS)),
        targets(block_of(p)),
        numbers(size_t(sources + p.targets()) * sizeof(int64_t), false),
        vectors(size_t(sources + targets) * sizeof(void*), false),
        scales(size_t(sources + targets * (1 + MATCH_ROWS)) * sizeof(A), false),
        strips(size_t(targets * MATCH_ROWS) * sizeof(A), false),
        norms(size_t(p.tokens) * sizeof(double), false),
        bests(size_t(sources) * sizeof(Best<A>), false),
        copies(size_t((sources + targets) * p.row_bytes()), false) {}
};

// Folds the approximate cosines of MATCH_ROWS sources with one block of targets into what is known of the sources.
template <typename T, typename E, typename A = Accumulate<T>>
static void match_tile(const Similarities<T>& p, const T* sample, const Tail<E>& tail, const Tokens<A>& sources,
                       int64_t first_source, const Tokens<A>& targets, const A* spread_scale, bool last_of_one,
                       A* strip, double* norms, Best<A>* best, Ahead& ahead) {
  constexpr int V = MATCH_VECTORS<A>, L = LANES<A>;
  const auto* rows = reinterpret_cast<const E* const*>(sources.vectors + first_source);
  const auto* columns = reinterpret_cast<const E* const*>(targets.vectors);
  Vector<A> highest[V], second[V], v[V];
  Lanes<A> tile[V] = {};
  for (int m = 0; m < V; ++m) highest[m] = second[m] = broadcast(A(-HUGE_VALF));
  for (int64_t j = 0; j < targets.count; j += MATCH_COLUMNS) {
    products<E>(rows, columns + j, p.width, tail, ahead, v);
    for (int m = 0; m < V; ++m) {
      const Vector<A> value = v[m] * load(spread_scale + j * MATCH_ROWS + m * L);
      store(strip + j * MATCH_ROWS + m * L, value);
      const auto higher = highest[m] < value;
      const Vector<A> lower = higher ? highest[m] : value;
      second[m] = second[m] < lower ? lower : second[m];
      highest[m] = higher ? value : highest[m];
      tile[m] = higher ? (Lanes<A>{} + decltype(tile[m][0] + 0)(j)) : tile[m];
    }
  }

  const A error = rounding_error<A>(p.width);
  A all_highest[MATCH_PRODUCTS], all_second[MATCH_PRODUCTS];
  decltype(tile[0][0] + 0) all_tile[MATCH_PRODUCTS];
  for (int m = 0; m < V; ++m) {
    store(all_highest + m * L, highest[m]);
    store(all_second + m * L, second[m]);
    std::memcpy(all_tile + m * L, &tile[m], sizeof tile[m]);
  }
  for (int i = 0; i < MATCH_ROWS && first_source + i < sources.count; ++i) {
    Best<A>& known = best[first_source + i];
    const A scale = sources.scale[first_source + i];
    int64_t winner = 0;
    for (int k = i; k < MATCH_PRODUCTS; k += MATCH_ROWS) {
      const A high = all_highest[k] * scale, next = all_second[k] * scale;
      if (high > known.highest) {
        known.second = known.highest < next ? next : known.highest;
        known.highest = high;
        winner = int64_t(all_tile[k]) + k / MATCH_ROWS;
      } else if (high > known.second) {
        known.second = high;
      }
    }
    const auto number = [&](int64_t j) { return (targets.number[j] - p.first_target()) / 2; };
    const A least = known.highest - 2 * error;
    if (last_of_one && known.second < least) {
      known.proposal = {float(known.highest), sizeof(T) == 8 ? 0.0f : float(error), number(winner)};
      continue;
    }
    // Rounding may have changed their order.
    for (int64_t j = 0; j < targets.count; ++j) {
      const A value = strip[j * MATCH_ROWS + i] * scale;
      if (!(value >= least)) continue;
      float cosine = float(value);
      if constexpr (sizeof(T) < 8) {
        const int64_t pair[2] = {sources.number[first_source + i], targets.number[j]};
        const T* row[2];
        for (int k = 0; k < 2; ++k) {
          row[k] = sample + pair[k] * p.stride_token;
          if (norms[pair[k]] < 0) norms[pair[k]] = length_of(row[k], p.width).norm;
        }
        cosine = exact_cosine(row[0], norms[pair[0]], row[1], norms[pair[1]], p.width);
      }
      if (cosine > known.proposal.similarity) known.proposal = {cosine, 0, number(j)};
    }
  }
}

template <typename T, typename E, typename A = Accumulate<T>>
static void match_block(const Similarities<T>& p, const T* sample, const Tokens<A>& sources, const Tokens<A>& targets,
                        bool last_of_one, MatchRoom<T>& room, A* spread_scale, Ahead& ahead) {
  const Tail<E> tail(p.width);
  for (int64_t j = 0; j < rounded_up(targets.count, MATCH_COLUMNS); ++j) {
    for (int i = 0; i < MATCH_ROWS; ++i) spread_scale[j * MATCH_ROWS + i] = targets.scale[j];
  }
  for (int64_t i = 0; i < sources.count; i += MATCH_ROWS) {
    match_tile<T, E>(p, sample, tail, sources, i, targets, spread_scale, last_of_one, room.strips.template as<A>(),
                     room.norms.template as<double>(), room.bests.template as<Best<A>>(), ahead);
  }
}

template <typename T>
static void similarities(const Similarities<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t group = p.group();
  const Tail<T> tail(p.width);
  MatchRoom<T> room(p);
  const int64_t block = room.targets;
  auto* best = room.bests.template as<Best<A>>();
  auto* norms = room.norms.template as<double>();
  auto* source_number = room.numbers.template as<int64_t>();
  int64_t* target_number = source_number + room.sources;
  auto* vectors = room.vectors.template as<const void*>();
  A *scales = room.scales.template as<A>(), *copies = room.copies.template as<A>();
  A* spread_scale = scales + room.sources + room.targets;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), first = task % p.groups() * group;
    const int64_t last = first + group < p.sources() ? first + group : p.sources();
    const T* sample = p.metric + b * p.stride_batch;
    int64_t source_count = 0, target_count = 0;
    for (int64_t t = 0; t < p.targets(); ++t) {
      const int64_t n = p.first_target() + 2 * t;
      if (p.real(b, n)) target_number[target_count++] = n;
    }
    for (int64_t s = first; s < last; ++s) {
      const int64_t n = p.first_source() + 2 * s;
      p.proposals[b * p.sources() + s] = {-HUGE_VALF, 0, 0};
      if (p.real(b, n) && target_count > 0) source_number[source_count++] = n;
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
    Tokens<A> sources{source_count, source_number, vectors, scales};
    const int64_t padded = rounded_up(source_count, MATCH_ROWS);
    bool as_they_are = point_at(p, sample, tail, padded, sources);
    if (!as_they_are) point_at_directions(p, sample, padded, copies, sources);
    for (int64_t from = 0; from < target_count; from += block) {
      const int64_t count = target_count - from < block ? target_count - from : block;
      const int64_t padded_count = rounded_up(count, MATCH_COLUMNS);
      Tokens<A> targets{count, target_number + from, vectors + room.sources, scales + room.sources};
      const bool ordinary = point_at(p, sample, tail, padded_count, targets);
      if (as_they_are && ordinary) {
        match_block<T, T>(p, sample, sources, targets, count == target_count, room, spread_scale, ahead);
        continue;
      }
      if (as_they_are) point_at_directions(p, sample, padded, copies, sources);
      as_they_are = false;
      point_at_directions(p, sample, padded_count, copies + room.sources * p.width, targets);
      match_block<T, A>(p, sample, sources, targets, count == target_count, room, spread_scale, ahead);
    }
    for (int64_t k = 0; k < source_count; ++k) {
      p.proposals[b * p.sources() + (source_number[k] - p.first_source()) / 2] = best[k].proposal;
    }
  }
}

#undef MLIP_FULLY_UNROLLED
#undef MLIP_FORCED
