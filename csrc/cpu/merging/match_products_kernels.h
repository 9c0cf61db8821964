// Cosines: the defined one of two vectors, and approximate ones of a few sources with a block of targets. Included by
// match.cpp, once per instruction set.
//
// Approximate products are summed with channels in the lanes, so that vectors are read where they lie. A tile of
// MATCH_ROWS sources and MATCH_COLUMNS targets has a register for the sums of each of its products; at the end shuffles
// and additions turn them into vectors with one product to a lane.

#define MLIP_FULLY_UNROLLED _Pragma("GCC unroll 32")
#define MLIP_FORCED static inline __attribute__((always_inline))
#define MLIP_NOINLINE __attribute__((noinline))

typedef float HalfOfFloats __attribute__((vector_size(MLIP_VECTOR_BYTES / 2)));

static inline void widen(Vector<float> v, Vector<double>* wide) {
  HalfOfFloats halves[2];
  std::memcpy(halves, &v, sizeof v);
  for (int h = 0; h < 2; ++h) wide[h] = __builtin_convertvector(halves[h], Vector<double>);
}

// <a, b> in float64, where squares of float32 can neither overflow nor vanish.
template <typename T>
static MLIP_NOINLINE double exact_product(const T* a, const T* b, int64_t width) {
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
static MLIP_NOINLINE Length length_of(const T* row, int64_t width) {
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
  const T* first = from + source * p.stride_token;
  const T* second = from + target * p.stride_token;
  return exact_cosine(first, length_of(first, p.width).norm, second, length_of(second, p.width).norm, p.width);
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

// Sources, and targets, whose products are summed in registers side by side.
constexpr int MATCH_ROWS = 4;
constexpr int MATCH_COLUMNS = MLIP_X86 && MLIP_VECTOR_BYTES < 64 ? 2 : 4;
constexpr int MATCH_PRODUCTS = MATCH_ROWS * MATCH_COLUMNS;

template <typename A>
constexpr int MATCH_VECTORS = MATCH_PRODUCTS / LANES<A>;  // that hold one number for each of these pairs

template <typename A>
using Lanes = typename VectorOf<A>::bits;

// The elements behind the last whole vector of a row, in the upper lanes above zeros: one load of a whole vector,
// unless a row is shorter than that.
template <typename T, typename A = Accumulate<T>>
struct Tail {
  int64_t at, count;  // of the load
  Lanes<A> mask;      // all ones where a lane counts

  explicit Tail(int64_t width) {
    constexpr int64_t L = LANES<A>;
    at = width < L ? 0 : width - L;
    count = width < L ? width : L;
    for (int64_t k = 0; k < L; ++k) mask[k] = k < count - width % L ? 0 : ~decltype(mask[0] + 0)(0);
  }
  Vector<A> any(const T* row) const { return count == LANES<A> ? load(row + at) : load(row + at, count); }
  Vector<A> masked(const T* row) const { return (Vector<A>)((Lanes<A>)any(row) & mask); }
};

// Sum of squares in float32.
template <typename T>
static float squares(const T* row, int64_t width, const Tail<T>& tail) {
  constexpr int STEP = LANES<float>;
  Vector<float> sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * STEP <= width; d += 4 * STEP) {
    MLIP_FULLY_UNROLLED for (int k = 0; k < 4; ++k) {
      const Vector<float> v = load(row + d + k * STEP);
      sums[k] += v * v;
    }
  }
  for (; d + STEP <= width; d += STEP) {
    const Vector<float> v = load(row + d);
    sums[0] += v * v;
  }
  if (d < width) {
    const Vector<float> v = tail.masked(row);
    sums[1] += v * v;
  }
  return sum<float>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Where lane `k` of a step of `fold` comes from: blocks of 2 HALF lanes of two vectors are cut in halves, and part 0 or
// 1 of each taken, within 16 bytes where a block is not longer.
template <typename A>
constexpr int folded_from(int half, int part, int k) {
  constexpr int L = LANES<A>, QUARTER = 16 / int(sizeof(A));
  const int unit = half < QUARTER ? QUARTER : L, at = k % unit, within = at % (unit / 2);
  return k / unit * unit + within / half * 2 * half + part * half + within % half + (at < unit / 2 ? 0 : L);
}

template <typename A, int HALF, int PART, int... K>
MLIP_FORCED Vector<A> fold_part(Vector<A> a, Vector<A> b, std::integer_sequence<int, K...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, folded_from<A>(HALF, PART, K)...);
#else
  return __builtin_shuffle(a, b, (Lanes<A>){folded_from<A>(HALF, PART, K)...});
#endif
}

// LANES vectors to one whose lanes are their sums, lane `k` that of vector `folded_vector(k)`.
template <typename A, int HALF = LANES<A> / 2>
MLIP_FORCED void fold(Vector<A>* sums) {
  if constexpr (HALF > 0) {
    constexpr auto ALL = std::make_integer_sequence<int, LANES<A>>{};
    MLIP_FULLY_UNROLLED for (int k = 0; k < HALF; ++k) {
      const Vector<A> a = sums[2 * k], b = sums[2 * k + 1];
      sums[k] = fold_part<A, HALF, 0>(a, b, ALL) + fold_part<A, HALF, 1>(a, b, ALL);
    }
    fold<A, HALF / 2>(sums);
  }
}

template <typename A>
constexpr int folded_lane(int vector) {
  constexpr int QUARTER = 16 / int(sizeof(A)), QUARTERS = LANES<A> / QUARTER;
  return vector % QUARTERS * QUARTER + vector / QUARTERS;
}

// Memory that is read into the second-level cache while products are summed, a little at each step.
struct Ahead {
  const char* next;
  int64_t step;  // bytes
};

// Sums of the products of MATCH_ROWS and MATCH_COLUMNS vectors over their first channels, a multiple of what one vector
// register holds; returns how many.
template <typename T, typename A = Accumulate<T>>
MLIP_FORCED int64_t multiply(const T* const* rows, const T* const* columns, int64_t width, Ahead& ahead,
                             Vector<A> (*sums)[MATCH_ROWS]) {
  constexpr int64_t L = LANES<A>;
  const int64_t whole = width - width % L;
  for (int64_t d = 0; d < whole; d += L) {
    __builtin_prefetch(ahead.next, 0, 2);
    ahead.next += ahead.step;
    Vector<A> row[MATCH_ROWS];
    MLIP_FULLY_UNROLLED for (int i = 0; i < MATCH_ROWS; ++i) row[i] = load(rows[i] + d);
    MLIP_FULLY_UNROLLED for (int j = 0; j < MATCH_COLUMNS; ++j) {
      const Vector<A> column = load(columns[j] + d);
      MLIP_FULLY_UNROLLED for (int i = 0; i < MATCH_ROWS; ++i) sums[j][i] += row[i] * column;
    }
  }
  return whole;
}

#if MLIP_BF16_DOT
// Two channels to a lane, added one after the other. The instruction takes subnormal numbers as 0, which is nothing
// beside the lengths of ordinary vectors.
MLIP_FORCED int64_t multiply(const BFloat16* const* rows, const BFloat16* const* columns, int64_t width, Ahead& ahead,
                             Vector<float> (*sums)[MATCH_ROWS]) {
  constexpr int64_t PAIRS = 2 * LANES<float>;
  const int64_t whole = width - width % PAIRS;
  for (int64_t d = 0; d < whole; d += PAIRS) {
    __builtin_prefetch(ahead.next, 0, 2);
    ahead.next += 2 * ahead.step;
    __m512bh row[MATCH_ROWS];
    MLIP_FULLY_UNROLLED for (int i = 0; i < MATCH_ROWS; ++i) row[i] = (__m512bh)_mm512_loadu_si512(rows[i] + d);
    MLIP_FULLY_UNROLLED for (int j = 0; j < MATCH_COLUMNS; ++j) {
      const __m512bh column = (__m512bh)_mm512_loadu_si512(columns[j] + d);
      MLIP_FULLY_UNROLLED for (int i = 0; i < MATCH_ROWS; ++i) {
        sums[j][i] = (Vector<float>)_mm512_dpbf16_ps((__m512)sums[j][i], row[i], column);
      }
    }
  }
  return whole;
}
#endif

// to[m] lane l = <row i, column j> with i + MATCH_ROWS j = m LANES + l.
template <typename T, typename A = Accumulate<T>>
MLIP_FORCED void products(const T* const* rows_, const T* const* columns_, int64_t width, const Tail<T>& tail,
                          Ahead& ahead, Vector<A>* to) {
  constexpr int L = LANES<A>;
  const T *rows[MATCH_ROWS], *columns[MATCH_COLUMNS];
  std::memcpy(rows, rows_, sizeof rows);
  std::memcpy(columns, columns_, sizeof columns);
  Vector<A> sums[MATCH_COLUMNS][MATCH_ROWS] = {};
  int64_t done = multiply(rows, columns, width, ahead, sums);
  for (; done + L <= width; done += L) {  // what pairs of channels left
    Vector<A> row[MATCH_ROWS];
    for (int i = 0; i < MATCH_ROWS; ++i) row[i] = load(rows[i] + done);
    MLIP_FULLY_UNROLLED for (int j = 0; j < MATCH_COLUMNS; ++j) {
      const Vector<A> column = load(columns[j] + done);
      MLIP_FULLY_UNROLLED for (int i = 0; i < MATCH_ROWS; ++i) sums[j][i] += row[i] * column;
    }
  }
  if (done < width) {
    Vector<A> row[MATCH_ROWS];
    for (int i = 0; i < MATCH_ROWS; ++i) row[i] = tail.any(rows[i]);
    MLIP_FULLY_UNROLLED for (int j = 0; j < MATCH_COLUMNS; ++j) {
      const Vector<A> column = tail.masked(columns[j]);
      MLIP_FULLY_UNROLLED for (int i = 0; i < MATCH_ROWS; ++i) sums[j][i] += row[i] * column;
    }
  }
  MLIP_FULLY_UNROLLED for (int m = 0; m < MATCH_VECTORS<A>; ++m) {
    Vector<A> parts[L];
    MLIP_FULLY_UNROLLED for (int k = 0; k < L; ++k) {
      const int pair = m * L + folded_lane<A>(k);
      parts[k] = sums[pair / MATCH_ROWS][pair % MATCH_ROWS];
    }
    fold<A>(parts);
    to[m] = parts[0];
  }
}

// The highest approximate cosine of each of MATCH_ROWS sources, before the division by the source's length, the second
// highest, and the first target of the tile that has the highest; one for each column of a tile.
template <typename A>
struct Highest {
  A highest[MATCH_PRODUCTS], second[MATCH_PRODUCTS];
  int64_t tile[MATCH_PRODUCTS];
};

// Sweeps MATCH_ROWS sources over `count` targets. `scales` has 1 / length of each target MATCH_ROWS times; `strip`
// receives all products, divided by the length of the target.
template <typename E, typename A = Accumulate<E>>
static MLIP_NOINLINE void sweep_targets(const E* const* rows, const E* const* columns, int64_t count, int64_t width,
                                        const Tail<E>& tail, const A* scales, A* strip, Highest<A>* to, Ahead& ahead) {
  constexpr int V = MATCH_VECTORS<A>, L = LANES<A>;
  Vector<A> highest[V], second[V], v[V];
  Lanes<A> tile[V] = {};
  for (int m = 0; m < V; ++m) highest[m] = second[m] = broadcast(A(-HUGE_VALF));
  for (int64_t j = 0; j < count; j += MATCH_COLUMNS) {
    products<E>(rows, columns + j, width, tail, ahead, v);
    for (int m = 0; m < V; ++m) {
      const Vector<A> value = v[m] * load(scales + j * MATCH_ROWS + m * L);
      store(strip + j * MATCH_ROWS + m * L, value);
      const auto higher = highest[m] < value;
      const Vector<A> lower = higher ? highest[m] : value;
      second[m] = second[m] < lower ? lower : second[m];
      highest[m] = higher ? value : highest[m];
      tile[m] = higher ? (Lanes<A>{} + decltype(tile[m][0] + 0)(j)) : tile[m];
    }
  }
  for (int m = 0; m < V; ++m) {
    store(to->highest + m * L, highest[m]);
    store(to->second + m * L, second[m]);
    for (int k = 0; k < L; ++k) to->tile[m * L + k] = int64_t(tile[m][k]);
  }
}

#undef MLIP_FULLY_UNROLLED
#undef MLIP_FORCED
