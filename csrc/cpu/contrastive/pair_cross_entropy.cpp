// Cross-entropy of pairs. What it computes and how the work is split: cpu/contrastive/pair_cross_entropy.h.
#include "cpu/contrastive/pair_cross_entropy.h"

#include <limits>
#include <type_traits>
#include <utility>

#define MLIP_KERNELS "cpu/contrastive/pair_cross_entropy.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

#include "cpu/contrastive/similarity_tile_kernels.h"

#define MLIP_NOINLINE __attribute__((noinline))

// exp of every lane, for numbers up to 88 (709 for double).
//
// exp(x) = 2^k exp(r) with k the integer nearest to x / ln 2 and |r| <= ln 2 / 2. The Taylor polynomial of exp(r) is
// off by 0.2 * 2^-24 of it (double: 0.1 * 2^-53); with roundings the error is about one unit in the last place. exp(0)
// is 1. What would be subnormal is 0, and so is exp(-inf); NaN stays.

template <typename A>
struct Exponential;
template <>
struct Exponential<float> {
  using Bits = Bits32;
  static constexpr float LOWEST = -87.0f, PER_LN2 = 1.44269504f, ROUNDER = 0x1.8p23f;
  static constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;  // k times the high part is exact
  static constexpr int MANTISSA = 23;
  static constexpr float COEFFICIENTS[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
};
template <>
struct Exponential<double> {
  using Bits = VectorOf<double>::bits;
  static constexpr double LOWEST = -708.0, PER_LN2 = 1.4426950408889634, ROUNDER = 0x1.8p52;
  static constexpr double LN2_HIGH = 0x1.62e42fefap-1, LN2_LOW = 0x1.cf79abc9e3b3ap-40;
  static constexpr int MANTISSA = 52;
  static constexpr double COEFFICIENTS[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
};

template <typename A>
MLIP_FORCED Vector<A> exponential(Vector<A> x) {
  using Of = Exponential<A>;
  using Bits = typename Of::Bits;
  const Vector<A> shifted = x * Of::PER_LN2 + Of::ROUNDER;  // its last bits are k
  const Vector<A> k = shifted - Of::ROUNDER;
  const Vector<A> r = (x - k * Of::LN2_HIGH) - k * Of::LN2_LOW;
  Vector<A> sum = broadcast(Of::COEFFICIENTS[0]);
  MLIP_FULLY_UNROLLED for (int i = 1; i < int(sizeof Of::COEFFICIENTS / sizeof(A)); ++i) {
    sum = sum * r + Of::COEFFICIENTS[i];
  }
  const Vector<A> scaled = (Vector<A>)((Bits)sum + ((Bits)shifted << Of::MANTISSA));
  return x >= Of::LOWEST ? scaled : larger(Vector<A>{}, x);  // x where it is NaN
}

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

// A row or column without any possible class has no probabilities.
template <typename A>
MLIP_FORCED A log_of_sum(A largest, A sum) {
  return largest == NOTHING<A> ? std::numeric_limits<A>::quiet_NaN() : std::log(sum);
}

// What exponentials are taken below: the largest logit, where there is one.
template <typename A>
MLIP_FORCED Vector<A> origin(Vector<A> largest) {
  return largest == NOTHING<A> ? Vector<A>{} : largest;
}

// One tile: per row and per column the largest logit, and the sum of exponentials below it.
template <typename T>
struct PairTile {
  using A = Accumulate<T>;
  static constexpr int64_t MOST_ROWS = 64;

  int64_t rows, columns;
  const T* logits;
  int64_t stride;
  A *column_maxima, *column_sums;  // padded to whole vectors
  alignas(64) A maxima[MOST_ROWS], sums[MOST_ROWS];
};

template <typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE Vector<A> last_logits(const T* from, int64_t count) {
  return lane_numbers<A>() < Integer<A>(count) ? load(from, count) : broadcast(NOTHING<A>);
}

// Logits of a row from `column` on: a whole vector, with -inf behind the last of `columns`.
template <typename T, typename A = Accumulate<T>>
MLIP_FORCED Vector<A> logits_at(const T* row, int64_t column, int64_t columns) {
  return columns - column >= LANES<A> ? load(row + column) : last_logits(row + column, columns - column);
}

// Sums and maxima of N rows from `row` on, with exp(l) itself for rows and columns alike.
template <int N, bool BOTH, typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE void reduce_pair_rows(PairTile<T>& tile, int64_t row) {
  // Copies, as a store to column sums might change the tile.
  const T* const logits = tile.logits + row * tile.stride;
  const int64_t stride = tile.stride, columns = tile.columns;
  A *const column_maxima = tile.column_maxima, *const column_sums = tile.column_sums;
  Vector<A> largest[N], sums[N] = {};
  MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) largest[n] = broadcast(NOTHING<A>);
  for (int64_t c = 0; c < columns; c += LANES<A>) {
    Vector<A> column_largest = {}, column_sum = {};
    if constexpr (BOTH) {
      column_largest = load(column_maxima + c);
      column_sum = load(column_sums + c);
    }
    MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) {
      const Vector<A> value = logits_at(logits + n * stride, c, columns), exponentials = exponential<A>(value);
      largest[n] = larger(value, largest[n]);
      sums[n] += exponentials;
      column_largest = larger(value, column_largest);
      column_sum += exponentials;
    }
    if constexpr (BOTH) {
      store(column_maxima + c, column_largest);
      store(column_sums + c, column_sum);
    }
  }
  MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) {
    tile.sums[row + n] = sum<A>(sums[n]);
    A lanes[LANES<A>];
    store(lanes, largest[n]);
    for (int i = 1; i < LANES<A>; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    tile.maxima[row + n] = lanes[0];
  }
}

// Sums of N rows from `row` on, given all maxima, with one exponential for the row and one for the column. Column sums
// are null if they are not wanted. For logits that exp(l) does not fit, so rarely that one copy serves all types of
// logits that are accumulated in A.
template <int N, typename A>
static MLIP_NOINLINE void reduce_pair_rows_below(const A* logits, int64_t stride, int64_t columns, const A* maxima,
                                                 A* row_sums, const A* column_maxima, A* column_sums) {
  Vector<A> sums[N] = {}, below[N];
  MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) below[n] = origin<A>(broadcast(maxima[n]));
  for (int64_t c = 0; c < columns; c += LANES<A>) {
    Vector<A> column_below = {}, column_sum = {};
    if (column_sums) {
      column_below = origin<A>(load(column_maxima + c));
      column_sum = load(column_sums + c);
    }
    MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) {
      const Vector<A> value = load(logits + n * stride + c);
      sums[n] += exponential<A>(value - below[n]);
      if (column_sums) column_sum += exponential<A>(value - column_below);
    }
    if (column_sums) store(column_sums + c, column_sum);
  }
  MLIP_FULLY_UNROLLED for (int n = 0; n < N; ++n) row_sums[n] = sum<A>(sums[n]);
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

template <typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE void reduce_pair_tile_below(PairTile<T>& tile, bool both) {
  const int64_t stride = TILE_COLUMNS<A>;
  alignas(64) A logits[ROWS_AT_ONCE * TILE_COLUMNS<A>];  // widened, padded with -inf
  A* column_sums = both ? tile.column_sums : nullptr;
  for (int64_t row = 0; row < tile.rows;) {
    const int rows = tile.rows - row < ROWS_AT_ONCE ? 1 : ROWS_AT_ONCE;
    for (int n = 0; n < rows; ++n) {
      const T* from = tile.logits + (row + n) * tile.stride;
      A* to = logits + n * stride;
      for (int64_t c = 0; c < tile.columns; c += LANES<A>) store(to + c, logits_at(from, c, tile.columns));
    }
    const auto reduce = rows == 1 ? reduce_pair_rows_below<1, A> : reduce_pair_rows_below<ROWS_AT_ONCE, A>;
    reduce(logits, stride, tile.columns, tile.maxima + row, tile.sums + row, tile.column_maxima, column_sums);
    row += rows;
  }
}

template <bool BOTH, typename T, typename A = Accumulate<T>>
static void reduce_pair_tile(PairTile<T>& tile) {
  const int64_t padded = BOTH ? (tile.columns + LANES<A> - 1) / LANES<A> * LANES<A> : 0;
  for (int64_t c = 0; c < padded; c += LANES<A>) {
    store(tile.column_maxima + c, broadcast(NOTHING<A>));
    store(tile.column_sums + c, Vector<A>{});
  }
  for (int64_t r = tile.rows; r < tile.MOST_ROWS; ++r) tile.maxima[r] = tile.sums[r] = 0;
  int64_t row = 0;
  for (; row + ROWS_AT_ONCE <= tile.rows; row += ROWS_AT_ONCE) reduce_pair_rows<ROWS_AT_ONCE, BOTH>(tile, row);
  for (; row < tile.rows; ++row) reduce_pair_rows<1, BOTH>(tile, row);
  if (all_fit(tile.maxima, tile.rows) && (!BOTH || all_fit(tile.column_maxima, tile.columns))) {
    put_below(tile.maxima, tile.rows, tile.sums);
    put_below(tile.column_maxima, padded, tile.column_sums);
    return;
  }
  for (int64_t c = 0; c < padded; c += LANES<A>) store(tile.column_sums + c, Vector<A>{});
  reduce_pair_tile_below(tile, BOTH);
}

// Sum of l - largest over a row of the tile.
template <typename T, typename A = Accumulate<T>>
static double pair_distances(const PairTile<T>& tile, int64_t row) {
  const T* logits = tile.logits + row * tile.stride;
  const Vector<A> below = origin<A>(broadcast(tile.maxima[row]));
  Vector<A> total = {};
  for (int64_t c = 0; c < tile.columns; c += LANES<A>) {
    const Vector<A> distance = logits_at(logits, c, tile.columns) - below;
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
static void pair_cross_entropy_rows(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    p.both ? reduce_pair_block<true>(p, block) : reduce_pair_block<false>(p, block);
  }
}

template <typename T, typename A = Accumulate<T>>
static void pair_cross_entropy_columns(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
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

// One row of the gradient, from `gradient(value, column)`: a vector of logits, and column(p), the same columns of p.
template <typename T, typename Gradient, typename A = Accumulate<T>>
MLIP_FORCED void write_pair_row(const PairCrossEntropy<T>& p, int64_t row, bool streamed, const Gradient& gradient) {
  const T* from = p.logits + row * p.stride;
  T* to = p.grad_logits + row * p.columns;
  const int64_t whole = p.columns - p.columns % LANES<A>, rest = p.columns - whole;
  for (int64_t c = 0; c < whole; c += LANES<A>) {
    const Vector<A> result = gradient(load(from + c), [c](const A* of) { return load(of + c); });
    if (streamed) {
      stream(to + c, result);
    } else {
      store(to + c, result);
    }
  }
  if (rest)
    store(to + whole, gradient(load(from + whole, rest), [&](const A* of) { return load(of + whole, rest); }), rest);
}

template <typename T>
static Vector<Accumulate<T>> smoothing_of_class(const PairCrossEntropy<T>& p) {
  return broadcast(Accumulate<T>(p.label_smoothing / double(p.columns) * (p.both ? 2 : 1)));  // both: B = C
}

// exp(l) (exp(-lse_row) + exp(-lse_column)).
template <bool BOTH, bool STREAMED, typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE void pair_gradient_row(const PairCrossEntropy<T>& p, int64_t row) {
  const Vector<A> grad = broadcast(p.grad), even = smoothing_of_class(p);
  const Vector<A> factor = broadcast(A(std::exp(-(double(p.row_terms[row]) + double(p.row_terms[p.rows + row])))));
  write_pair_row(p, row, STREAMED, [&](Vector<A> value, auto column) {
    Vector<A> factors = factor;
    if constexpr (BOTH) factors += column(p.column_factor);
    return (exponential<A>(value) * factors - even) * grad;
  });
}

// exp(l - lse_row) + exp(l - lse_column), where the factors above do not fit.
template <typename T, typename A = Accumulate<T>>
static MLIP_NOINLINE void pair_gradient_row_below(const PairCrossEntropy<T>& p, int64_t row) {
  const Vector<A> grad = broadcast(p.grad), even = smoothing_of_class(p);
  const Vector<A> largest = broadcast(p.row_terms[row]), log = broadcast(p.row_terms[p.rows + row]);
  write_pair_row(p, row, p.streamed(), [&](Vector<A> value, auto column) {
    Vector<A> probability = exponential<A>((value - largest) - log);
    if (p.both) probability += exponential<A>((value - column(p.column_terms)) - column(p.column_terms + p.columns));
    return (probability - even) * grad;
  });
}

template <bool BOTH, bool STREAMED, typename T>
static void pair_gradient(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.columns_fit && fits(p.row_terms[row] + p.row_terms[p.rows + row])) {
      pair_gradient_row<BOTH, STREAMED>(p, row);
    } else {
      pair_gradient_row_below(p, row);
    }
  }
  if constexpr (STREAMED) fence();
}

template <typename T>
static void pair_cross_entropy_backward(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  const bool streamed = p.streamed();
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
static void pair_cross_entropy_backward_targets(const PairCrossEntropy<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = p.labels[i];
    const bool mutual = p.both && p.labels[label] == i;
    put_target(p, i, label, true, mutual);
    if (p.both && !mutual) put_target(p, label, i, false, true);
  }
}

#else

MLIP_DEFINE_DISPATCH(pair_cross_entropy_rows, PairCrossEntropy)
MLIP_DEFINE_DISPATCH(pair_cross_entropy_columns, PairCrossEntropy)
MLIP_DEFINE_DISPATCH(pair_cross_entropy_backward, PairCrossEntropy)
MLIP_DEFINE_DISPATCH(pair_cross_entropy_backward_targets, PairCrossEntropy)

namespace mlip::cpu {
namespace {

// `total` has the distances of all logits from the largest of their row (or column) of `classes` logits.
double loss_of(const PairSums& total, double classes, double label_smoothing) {
  if (label_smoothing == 0) return total.own;
  return (1 - label_smoothing) * total.own + label_smoothing * (total.logs - total.distances / classes);
}

PairSums added(const PairSums* sums, int64_t count) {
  PairSums total = {};
  for (int64_t i = 0; i < count; ++i) {
    total.own += sums[i].own;
    total.logs += sums[i].logs;
    total.maxima += sums[i].maxima;
    total.distances += sums[i].distances;
  }
  return total;
}

}  // namespace

template <typename T>
double pair_cross_entropy_loss(const PairCrossEntropy<T>& problem) {
  const double rows = double(problem.rows), columns = double(problem.columns);
  const PairSums of_rows = added(problem.row_sums, problem.blocks());
  const double loss = loss_of(of_rows, columns, problem.label_smoothing);
  if (!problem.both) return loss;
  PairSums of_columns = added(problem.column_sums, problem.column_tasks());
  of_columns.distances = of_rows.distances + columns * of_rows.maxima - rows * of_columns.maxima;
  return (loss + loss_of(of_columns, rows, problem.label_smoothing)) / 2;
}

template <typename T>
bool pair_cross_entropy_column_factors(const PairCrossEntropy<T>& problem) {
  MLIP_DISPATCH_ISA(pair_column_factors<T>, problem);
}

#define MLIP_INSTANTIATE(T)                                               \
  template double pair_cross_entropy_loss<T>(const PairCrossEntropy<T>&); \
  template bool pair_cross_entropy_column_factors<T>(const PairCrossEntropy<T>&)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu

#endif  // MLIP_VECTOR_BYTES
