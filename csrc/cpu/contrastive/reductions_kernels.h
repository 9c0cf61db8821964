// Maxima along either axis of a tile of similarities, and where they stand. Included by *_kernels.h.
//
// A strip of the tile is [rows][LANES]; its lanes are columns. Both reductions assume finite similarities. The first one
// also sums its input times 0: a sum that is not 0 tells the caller to take the slow path, which handles NaN.

template <typename A>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
  typedef int32_t vector __attribute__((vector_size(MLIP_VECTOR_BYTES)));
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
  typedef int64_t vector __attribute__((vector_size(MLIP_VECTOR_BYTES)));
};

// Indices in lanes as wide as A.
template <typename A>
using Integer = typename IntegerOf<A>::type;
template <typename A>
using Integers = typename IntegerOf<A>::vector;

// The larger of two, in one instruction (b where one is NaN).
#if MLIP_VECTOR_BYTES == 64
MLIP_FORCED Vector<float> larger(Vector<float> a, Vector<float> b) { return (Vector<float>)_mm512_max_ps(a, b); }
MLIP_FORCED Vector<double> larger(Vector<double> a, Vector<double> b) { return (Vector<double>)_mm512_max_pd(a, b); }
#elif MLIP_VECTOR_BYTES == 32
MLIP_FORCED Vector<float> larger(Vector<float> a, Vector<float> b) { return (Vector<float>)_mm256_max_ps(a, b); }
MLIP_FORCED Vector<double> larger(Vector<double> a, Vector<double> b) { return (Vector<double>)_mm256_max_pd(a, b); }
#else
template <typename V>
MLIP_FORCED V larger(V a, V b) {
  return a > b ? a : b;
}
#endif

struct Larger {
  template <typename V>
  MLIP_FORCED V of(V a, V b) {
    return larger(a, b);
  }
};
struct Smaller {
  template <typename V>
  MLIP_FORCED V of(V a, V b) {
    return a < b ? a : b;
  }
};

#if defined(__clang__)
#define MLIP_SHUFFLE(A, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MLIP_SHUFFLE(A, a, b, ...) __builtin_shuffle(a, b, Integers<A>{__VA_ARGS__})
#endif

// Lanes of `a` where bit H of the lane is 0 and lanes of `b` elsewhere, each joined with the lane H away from it.
template <typename A, typename Join, int H, typename V, int... I>
MLIP_FORCED V joined(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = LANES<A>;
  const V own = MLIP_SHUFFLE(A, a, b, (I & H ? L + I : I)...);
  const V away = MLIP_SHUFFLE(A, a, b, (I & H ? L + I - H : I + H)...);
  return Join::of(own, away);
}

// Lane i of the result joins all lanes of vectors[i]; there are 2 H of them.
template <typename A, typename Join, int H, typename V>
MLIP_FORCED V joined_lanes(V* vectors) {
  constexpr auto ALL = std::make_integer_sequence<int, LANES<A>>{};
  MLIP_FULLY_UNROLLED for (int i = 0; i < H; ++i) { vectors[i] = joined<A, Join, H>(vectors[i], vectors[i + H], ALL); }
  if constexpr (H > 1) {
    return joined_lanes<A, Join, H / 2>(vectors);
  } else {
    return vectors[0];
  }
}

// For every column of a strip: the largest of its `rows` similarities, which row has it, and a sum that is 0 where all
// are finite and NaN elsewhere.
template <typename A>
MLIP_FORCED void reduce_columns(const A* strip, int64_t rows, A* maxima, Integer<A>* best, A* zeros) {
  Vector<A> largest = broadcast(-std::numeric_limits<A>::infinity()), sum = {};
  Integers<A> row = {}, here = {};
  for (int64_t r = 0; r < rows; ++r, here += Integer<A>(1)) {
    const Vector<A> value = load(strip + r * LANES<A>);
    row = value > largest ? here : row;
    largest = larger(value, largest);
    sum += value * Vector<A>{};
  }
  store(maxima, largest);
  store(zeros, sum);
  std::memcpy(best, &row, sizeof row);
}

template <typename A>
MLIP_FORCED Integers<A> lane_numbers() {
  Integer<A> lane[LANES<A>];
  for (int i = 0; i < LANES<A>; ++i) lane[i] = i;
  Integers<A> lanes;
  std::memcpy(&lanes, lane, sizeof lanes);
  return lanes;
}

// For every row: the largest of its similarities in columns first <= c < last of the tile, and, unless `best` is null,
// its distance from `first`. `stride` lies between strips. Reads and writes up to LANES - 1 rows too many.
template <typename A>
static void reduce_rows(const A* tile, int64_t stride, int64_t rows, int64_t first, int64_t last, A* maxima,
                        Integer<A>* best) {
  constexpr int L = LANES<A>;
  const int64_t first_strip = first / L, last_strip = (last - 1) / L;
  const Integers<A> lanes = lane_numbers<A>();
  // 0 where a lane of the first or last strip is one of the columns, -inf elsewhere
  const Vector<A> none = broadcast(-std::numeric_limits<A>::infinity());
  const Vector<A> in_last = lanes < Integer<A>(last - last_strip * L) ? Vector<A>{} : none;
  Vector<A> in_first = lanes < Integer<A>(first - first_strip * L) ? none : Vector<A>{};
  if (first_strip == last_strip) in_first += in_last;

  for (int64_t r = 0; r < rows; r += L) {
    const A* strip = tile + first_strip * stride + r * L;
    Vector<A> largest[L];
    MLIP_FULLY_UNROLLED for (int i = 0; i < L; ++i) largest[i] = load(strip + i * L) + in_first;
    for (int64_t s = first_strip + 1; s < last_strip; ++s) {
      strip += stride;
      MLIP_FULLY_UNROLLED for (int i = 0; i < L; ++i) largest[i] = larger(load(strip + i * L), largest[i]);
    }
    if (last_strip > first_strip) {
      strip += stride;
      MLIP_FULLY_UNROLLED for (int i = 0; i < L; ++i) largest[i] = larger(load(strip + i * L) + in_last, largest[i]);
    }
    store(maxima + r, joined_lanes<A, Larger, L / 2>(largest));
    if (best == nullptr) continue;

    Integers<A> column[L];
    MLIP_FULLY_UNROLLED for (int i = 0; i < L; ++i) column[i] = lanes + std::numeric_limits<int32_t>::max() - L;
    Integers<A> here = lanes + Integer<A>(last_strip * L - first);
    for (int64_t s = last_strip; s >= first_strip; --s, strip -= stride, here -= Integer<A>(L)) {
      const Vector<A> inside = s == first_strip ? in_first : s == last_strip ? in_last : Vector<A>{};
      MLIP_FULLY_UNROLLED for (int i = 0; i < L; ++i) {
        column[i] = load(strip + i * L) + inside == broadcast(maxima[r + i]) ? here : column[i];
      }
    }
    const Integers<A> smallest = joined_lanes<A, Smaller, L / 2>(column);
    std::memcpy(best + r, &smallest, sizeof smallest);
  }
}

// Both reductions as PyTorch defines them for any values: NaN is larger than everything, the first of equals wins.
template <typename A>
static void reduce_any(const A* tile, int64_t stride, int64_t rows, int64_t first, int64_t last, A* row_maxima,
                       Integer<A>* best_column, A* column_maxima, Integer<A>* best_row) {
  const auto at = [&](int64_t r, int64_t c) { return tile[c / LANES<A> * stride + r * LANES<A> + c % LANES<A>]; };
  const auto beats = [](A value, A champion) { return value > champion || (value != value && champion == champion); };
  for (int64_t r = 0; r < rows; ++r) {
    int64_t best = first;
    for (int64_t c = first + 1; c < last; ++c) best = beats(at(r, c), at(r, best)) ? c : best;
    row_maxima[r] = at(r, best);
    best_column[r] = Integer<A>(best - first);
  }
  for (int64_t c = first; c < last; ++c) {
    int64_t best = 0;
    for (int64_t r = 1; r < rows; ++r) best = beats(at(r, c), at(best, c)) ? r : best;
    column_maxima[c - first] = at(best, c);
    best_row[c - first] = Integer<A>(best);
  }
}
