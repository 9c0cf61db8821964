// Compiled once per instruction set (cpu/simd.h). What each function does is said in
// cpu/contrastive/pair_cross_entropy.h.

#include "cpu/contrastive/operands_kernels.h"
#include "cpu/contrastive/reductions_kernels.h"
#include "cpu/contrastive/exponential_kernels.h"

// Of a tile, which fits the second-level cache: a lane adds 64 numbers, which rounds little.
template <typename A>
constexpr int64_t TILE_COLUMNS = 64 * LANES<A>;
constexpr int ROWS_AT_ONCE = 4;  // their sums and maxima, and those of one vector of columns, stay in registers

template <typename A>
constexpr A NOTHING = -std::numeric_limits<A>::infinity();

// Logits of this size have exponentials that can be added, and from which no term that matters was lost.
template <typename A>
MLIP_FORCED bool fits(A logit) {
  return sizeof(A) == 4 ? -60 <= logit && logit <= 75 : -600 <= logit && logit <= 650;
}

// exp(from - to) for from <= to; 1 for equal infinities, of which nothing has to be scaled.
template <typename A>
MLIP_FORCED A scale(A from, A to) {
  return from == to ? A(1) : std::exp(from - to);
}

// A line without any possible class has no probabilities.
template <typename A>
MLIP_FORCED A log_of_sum(A largest, A sum) {
  return largest == NOTHING<A> ? std::numeric_limits<A>::quiet_NaN() : std::log(sum);
}

// What exponentials are taken below: the largest logit, where there is one.
template <typename A>
MLIP_FORCED Vector<A> origin(Vector<A> largest) {
  return largest == NOTHING<A> ? Vector<A>{} : largest;
}

// One tile: per row and per column the largest logit, and the sum of exponentials below it. Columns are padded to whole
// vectors, of which the last has `rest` columns.
template <typename T>
struct PairTile {
  using A = Accumulate<T>;
  static constexpr int64_t MOST_ROWS = 64;

  int64_t rows, columns;
  const T* logits;
  int64_t stride;
  A *column_maxima, *column_sums;  // padded
  alignas(64) A maxima[MOST_ROWS], sums[MOST_ROWS];
};

// Logits of a row from `column` on: a whole vector, with -inf where no column is.
template <typename T, typename A = Accumulate<T>>
MLIP_FORCED Vector<A> logits_at(const PairTile<T>& tile, int64_t row, int64_t column) {
  const T* from = tile.logits + row * tile.stride + column;
  const int64_t left = tile.columns - column;
  if (left >= LANES<A>) return load(from);
  return lane_numbers<A>() < Integer<A>(left) ? load(from, left) : broadcast(NOTHING<A>);
}

// Sums, and if SHARED maxima too, of N rows from `row` on. SHARED: of exp(l) itself, for rows and columns alike.
template <int N, bool BOTH, bool SHARED, typename T, typename A = Accumulate<T>>
static void reduce_pair_rows(PairTile<T>& tile, int64_t row) {
  Vector<A> largest[N], sums[N] = {}, below[N];
  MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) {
    largest[n] = broadcast(NOTHING<A>);
    if constexpr (!SHARED) below[n] = origin<A>(broadcast(tile.maxima[row + n]));
  }
  for (int64_t c = 0; c < tile.columns; c += LANES<A>) {
    Vector<A> column_largest = {}, column_sum = {};
    if constexpr (BOTH) {
      column_largest = load(tile.column_maxima + c);
      column_sum = load(tile.column_sums + c);
    }
    MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) {
      const Vector<A> value = logits_at(tile, row + n, c);
      if constexpr (SHARED) {
        const Vector<A> exponentials = exponential<A>(value);
        largest[n] = larger(value, largest[n]);
        sums[n] += exponentials;
        column_largest = larger(value, column_largest);
        column_sum += exponentials;
      } else {
        sums[n] += exponential<A>(value - below[n]);
        if constexpr (BOTH) column_sum += exponential<A>(value - origin<A>(column_largest));
      }
    }
    if constexpr (BOTH) {
      if constexpr (SHARED) store(tile.column_maxima + c, column_largest);
      store(tile.column_sums + c, column_sum);
    }
  }
  MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) {
    tile.sums[row + n] = sum<A>(sums[n]);
    if constexpr (!SHARED) continue;
    A lanes[LANES<A>];
    store(lanes, largest[n]);
    for (int i = 1; i < LANES<A>; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    tile.maxima[row + n] = lanes[0];
  }
}

template <bool BOTH, bool SHARED, typename T>
static void reduce_pair_tile(PairTile<T>& tile) {
  int64_t row = 0;
  for (; row + ROWS_AT_ONCE <= tile.rows; row += ROWS_AT_ONCE) reduce_pair_rows<ROWS_AT_ONCE, BOTH, SHARED>(tile, row);
  for (; row < tile.rows; ++row) reduce_pair_rows<1, BOTH, SHARED>(tile, row);
}

// sums / exp(maxima)
template <typename A>
static void put_below(const A* maxima, int64_t count, A* sums) {
  for (int64_t i = 0; i < count; i += LANES<A>) {
    store(sums + i, load(sums + i) / exponential<A>(load(maxima + i)));
  }
}

template <typename A>
static bool all_fit(const A* maxima, int64_t count) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= fits(maxima[i]);
  return all;
}

template <bool BOTH, typename T, typename A = Accumulate<T>>
static void reduce_pair_tile(PairTile<T>& tile) {
  const int64_t padded = BOTH ? (tile.columns + LANES<A> - 1) / LANES<A> * LANES<A> : 0;
  for (int64_t c = 0; c < padded; c += LANES<A>) {
    store(tile.column_maxima + c, broadcast(NOTHING<A>));
    store(tile.column_sums + c, Vector<A>{});
  }
  for (int64_t r = tile.rows; r < tile.MOST_ROWS; ++r) tile.maxima[r] = tile.sums[r] = 0;
  reduce_pair_tile<BOTH, true>(tile);
  if (all_fit(tile.maxima, tile.rows) && (!BOTH || all_fit(tile.column_maxima, tile.columns))) {
    put_below(tile.maxima, tile.rows, tile.sums);
    put_below(tile.column_maxima, padded, tile.column_sums);
    return;
  }
  for (int64_t c = 0; c < padded; c += LANES<A>) store(tile.column_sums + c, Vector<A>{});
  reduce_pair_tile<BOTH, false>(tile);
}

// Sum of l - largest over a row of the tile.
template <typename T, typename A = Accumulate<T>>
static double pair_distances(const PairTile<T>& tile, int64_t row) {
  const Vector<A> below = origin<A>(broadcast(tile.maxima[row]));
  Vector<A> total = {};
  for (int64_t c = 0; c < tile.columns; c += LANES<A>) {
    const Vector<A> distance = logits_at(tile, row, c) - below;
    total += lane_numbers<A>() < Integer<A>(tile.columns - c) ? distance : Vector<A>{};
  }
  return double(sum<A>(total));
}

template <bool BOTH, typename T, typename A = Accumulate<T>>
static void reduce_pair_block(const PairCrossEntropy<T>& p, int64_t block) {
  const int64_t first = block * p.block_rows();
  PairTile<T> tile;
  tile.rows = p.rows - first < p.block_rows() ? p.rows - first : p.block_rows();
  tile.stride = p.stride;
  A largest[PairTile<T>::MOST_ROWS];
  double sums[PairTile<T>::MOST_ROWS], distances[PairTile<T>::MOST_ROWS];
  for (int64_t column = 0; column < p.columns; column += TILE_COLUMNS<A>) {
    tile.columns = p.columns - column < TILE_COLUMNS<A> ? p.columns - column : TILE_COLUMNS<A>;
    tile.logits = p.logits + first * p.stride + column;
    if constexpr (BOTH) {
      tile.column_maxima = p.partial + 2 * block * p.padded_columns() + column;
      tile.column_sums = tile.column_maxima + p.padded_columns();
    }
    reduce_pair_tile<BOTH>(tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (column == 0) {
        largest[r] = tile.maxima[r];
        sums[r] = distances[r] = 0;
      }
      const A before = largest[r], here = tile.maxima[r], now = here > before ? here : before;
      sums[r] = sums[r] * double(scale(before, now)) + double(tile.sums[r]) * double(scale(here, now));
      if (p.label_smoothing != 0) {
        // Both parts are counted from the largest now; where there is none yet, from 0.
        const auto moved = [now](A from) { return from == now || from == NOTHING<A> ? 0.0 : double(from) - now; };
        distances[r] += double(column) * moved(before);
        distances[r] += pair_distances(tile, r) + double(tile.columns) * moved(here);
      }
      largest[r] = now;
    }
  }
  PairSums total = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = first + r;
    const A log = log_of_sum(largest[r], A(sums[r]));
    Vector<A> own = load(p.logits + i * p.stride + p.labels[i], 1);
    p.row_terms[i] = largest[r];
    p.row_terms[p.rows + i] = log;
    p.own[i] = own[0];
    total.own += double(log) + (double(largest[r]) - double(own[0]));
    total.logs += double(log);
    total.maxima += double(largest[r]);
    total.distances += distances[r];
  }
  p.row_sums[block] = total;
}

template <typename T>
static void pair_rows(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    p.both ? reduce_pair_block<true>(p, block) : reduce_pair_block<false>(p, block);
  }
}

template <typename T, typename A = Accumulate<T>>
static void pair_columns(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  const int64_t padded = p.padded_columns(), blocks = p.blocks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * p.COLUMNS_OF_TASK;
    const int64_t last = first + p.COLUMNS_OF_TASK < p.columns ? first + p.COLUMNS_OF_TASK : p.columns;
    PairSums total = {};
    for (int64_t c = first; c < last; c += LANES<A>) {
      Vector<A> largest = load(p.partial + c), sums = {};
      for (int64_t b = 1; b < blocks; ++b) largest = larger(load(p.partial + 2 * b * padded + c), largest);
      for (int64_t b = 0; b < blocks; ++b) {
        const Vector<A> here = load(p.partial + 2 * b * padded + c), part = load(p.partial + (2 * b + 1) * padded + c);
        sums += here == largest ? part : part * exponential<A>(here - largest);
      }
      for (int64_t j = c; j < last && j < c + LANES<A>; ++j) {
        const A log = log_of_sum(largest[j - c], sums[j - c]);
        const int64_t label = p.labels[j];
        // The logit is at hand where pair and label name each other.
        const A own = p.labels[label] == j ? p.own[label] : load(p.logits + label * p.stride + j, 1)[0];
        p.column_terms[j] = largest[j - c];
        p.column_terms[p.columns + j] = log;
        total.own += double(log) + (double(largest[j - c]) - double(own));
        total.logs += double(log);
        total.maxima += double(largest[j - c]);
      }
    }
    p.column_sums[task] = total;
  }
}

// SHARED: exp(l) (exp(-lse_row) + exp(-lse_column)).
template <bool BOTH, bool SHARED, bool STREAMED, typename T, typename A = Accumulate<T>>
static void pair_gradient_row(const PairCrossEntropy<T>& p, int64_t row) {
  const T* from = p.logits + row * p.stride;
  T* to = p.grad_logits + row * p.columns;
  const A row_largest = p.row_terms[row], row_log = p.row_terms[p.rows + row];
  const Vector<A> largest = broadcast(row_largest), log = broadcast(row_log), grad = broadcast(p.grad);
  const Vector<A> factor = broadcast(A(std::exp(-(double(row_largest) + double(row_log)))));
  const Vector<A> even = broadcast(A(p.label_smoothing / double(p.columns) * (BOTH ? 2 : 1)));  // both: B = C
  const auto gradient = [&](Vector<A> value, auto column) {
    Vector<A> probability;
    if constexpr (SHARED) {
      Vector<A> factors = factor;
      if constexpr (BOTH) factors += column(p.column_factor);
      probability = exponential<A>(value) * factors;
    } else {
      probability = exponential<A>((value - largest) - log);
      if constexpr (BOTH) {
        probability += exponential<A>((value - column(p.column_terms)) - column(p.column_terms + p.columns));
      }
    }
    return (probability - even) * grad;
  };
  const int64_t whole = p.columns - p.columns % LANES<A>, rest = p.columns - whole;
  for (int64_t c = 0; c < whole; c += LANES<A>) {
    const Vector<A> result = gradient(load(from + c), [c](const A* of) { return load(of + c); });
    if constexpr (STREAMED) {
      stream(to + c, result);
    } else {
      store(to + c, result);
    }
  }
  if (rest)
    store(to + whole, gradient(load(from + whole, rest), [&](const A* of) { return load(of + whole, rest); }), rest);
}

template <bool BOTH, bool STREAMED, typename T, typename A = Accumulate<T>>
static void pair_gradient(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.columns_fit && fits(p.row_terms[row] + p.row_terms[p.rows + row])) {
      pair_gradient_row<BOTH, true, STREAMED>(p, row);
    } else {
      pair_gradient_row<BOTH, false, STREAMED>(p, row);
    }
  }
  if constexpr (STREAMED) fence();
}

template <typename T>
static void pair_backward(const PairCrossEntropy<T>& p, bool streamed, int64_t begin, int64_t end) {
  if (p.both) {
    streamed ? pair_gradient<true, true>(p, begin, end) : pair_gradient<true, false>(p, begin, end);
  } else {
    streamed ? pair_gradient<false, true>(p, begin, end) : pair_gradient<false, false>(p, begin, end);
  }
}

template <typename T, typename A = Accumulate<T>>
static bool pair_column_factors(const PairCrossEntropy<T>& p) {
  bool all = true;
  for (int64_t j = 0; p.both && j < p.columns; ++j) {
    const A largest = p.column_terms[j], log = p.column_terms[p.columns + j];
    p.column_factor[j] = A(std::exp(-(double(largest) + double(log))));
    all &= fits(A(largest + log));
  }
  return all;
}

// The gradient where row and column meet, one of which or both have their target there.
template <typename T, typename A = Accumulate<T>>
static void put_target(const PairCrossEntropy<T>& p, int64_t row, int64_t column, bool of_row, bool of_column) {
  const A value = load(p.logits + row * p.stride + column, 1)[0];
  const A even = A(p.label_smoothing / double(p.columns)), smoothing = A(p.label_smoothing);
  const auto less_target = [&](A largest, A log, bool target) {
    const A logarithm = (value - largest) - log;
    return target ? std::expm1(logarithm) + (smoothing - even) : std::exp(logarithm) - even;
  };
  A gradient = less_target(p.row_terms[row], p.row_terms[p.rows + row], of_row);
  if (p.both) gradient += less_target(p.column_terms[column], p.column_terms[p.columns + column], of_column);
  store(p.grad_logits + row * p.columns + column, broadcast(A(gradient * p.grad)), 1);
}

template <typename T>
static void pair_backward_targets(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = p.labels[i];
    const bool mutual = p.both && p.labels[label] == i;
    put_target(p, i, label, true, mutual);
    if (p.both && !mutual) put_target(p, label, i, false, true);
  }
}
