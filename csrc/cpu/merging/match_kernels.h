// Compiled once per instruction set (cpu/simd.h). What it computes and how the work is split: cpu/merging/match.h.

constexpr int MATCH_ROWS = MLIP_VECTOR_BYTES == 64 ? 8 : 4;  // sources, and
constexpr int MATCH_VECTORS = 2;                             // vectors of targets that registers hold products of
constexpr int64_t MATCH_CHUNK = 128;                         // elements summed in registers, then added to the strip

template <typename A>
constexpr int MATCH_COLUMNS = MATCH_VECTORS * LANES<A>;

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
  double norm, inverse, largest;
};

template <typename T>
static Length length_of(const T* row, int64_t width) {
  Length length{0, 0, 1};
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
  length.inverse = 1 / length.norm;
  return length;
}

// Normalised elements [d, d + count) of a row, count <= LANES.
template <typename T, typename A = Accumulate<T>>
static inline Vector<A> direction(const T* row, const Length& length, int64_t d, int64_t count) {
  const Vector<A> v = count == LANES<A> ? load(row + d) : load(row + d, count);
  if constexpr (sizeof(T) == 8) {
    return v / length.largest / length.norm;
  } else if (0x1p-120 < length.norm && length.norm < 0x1p120) {
    return v * broadcast(float(length.inverse));
  } else {
    Vector<double> wide[2];
    widen(v, wide);
    HalfOfFloats halves[2];
    for (int h = 0; h < 2; ++h) halves[h] = __builtin_convertvector(wide[h] * length.inverse, HalfOfFloats);
    Vector<A> narrow;
    std::memcpy(&narrow, halves, sizeof narrow);
    return narrow;
  }
}

// to[j][i] = from[i][j] for 4 rows and `count` columns, count <= LANES.
static inline void transpose(const float (*from)[LANES<float>], int64_t count, float* to, int64_t stride) {
  int64_t j = 0;
#if MLIP_X86
  for (; j + 4 <= count; j += 4) {
    __m128 rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from[i] + j);
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (j + i) * stride, rows[i]);
  }
#endif
  for (; j < count; ++j) {
    for (int i = 0; i < 4; ++i) to[j * stride + i] = from[i][j];
  }
}

static inline void transpose(const double (*from)[LANES<double>], int64_t count, double* to, int64_t stride) {
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < 4; ++i) to[j * stride + i] = from[i][j];
  }
}

// Panel of rows in tiles of COLUMNS: panel[tile][d][column] = rows[tile COLUMNS + column][d] / its length.
template <int COLUMNS, typename T, typename A = Accumulate<T>>
static void pack(const T* sample, int64_t stride, const int64_t* rows, const Length* lengths, int64_t count,
                 int64_t width, A* panel) {
  static_assert(COLUMNS % 4 == 0);
  for (int64_t first = 0; first < count; first += COLUMNS, panel += COLUMNS * width) {
    for (int64_t from = 0; from < width; from += 4 * LANES<A>) {
      const int64_t to = from + 4 * LANES<A> < width ? from + 4 * LANES<A> : width;
      for (int column = 0; column < COLUMNS; column += 4) {
        for (int64_t d = from; d < to; d += LANES<A>) {
          const int64_t many = to - d < LANES<A> ? to - d : LANES<A>;
          A directions[4][LANES<A>] = {};
          for (int i = 0; i < 4 && first + column + i < count; ++i) {
            const int64_t row = rows[first + column + i];
            if (lengths[row].norm > 0) {
              store(directions[i], direction<T>(sample + row * stride, lengths[row], d, many));
            }
          }
          transpose(directions, many, panel + d * COLUMNS + column, COLUMNS);
        }
      }
    }
  }
}

// strip[i][j] = <row i, column j> for MATCH_ROWS rows and VECTORS vectors of columns. Every product is summed in the
// same order, whatever the place of its vectors.
template <int VECTORS, typename A>
static void multiply(const A* rows, const A* columns, int64_t width, A* strip, int64_t stride) {
  for (int64_t from = 0; from < width; from += MATCH_CHUNK) {
    const int64_t to = from + MATCH_CHUNK < width ? from + MATCH_CHUNK : width;
    Vector<A> sums[MATCH_ROWS][VECTORS] = {};
    for (int64_t d = from; d < to; ++d) {
      Vector<A> column[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) column[v] = load(columns + d * MATCH_COLUMNS<A> + v * LANES<A>);
#pragma GCC unroll 8
      for (int i = 0; i < MATCH_ROWS; ++i) {
        const Vector<A> row = broadcast(rows[d * MATCH_ROWS + i]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sums[i][v] += row * column[v];
      }
    }
    for (int i = 0; i < MATCH_ROWS; ++i) {
      for (int v = 0; v < VECTORS; ++v) {
        A* to_strip = strip + i * stride + v * LANES<A>;
        store(to_strip, from == 0 ? sums[i][v] : load(to_strip) + sums[i][v]);
      }
    }
  }
}

// By how much two strip values may differ although the cosines behind them tie or stand the other way round. Rounding:
// of both elements and of their product, of the sum within a chunk and over chunks, with |a| |b| = 1; and of the
// cosines to float32.
template <typename A>
static A tolerance(int64_t width) {
  const int64_t roundings = (width < MATCH_CHUNK ? width : MATCH_CHUNK) + width / MATCH_CHUNK + 8;
  return A(2 * double(roundings) * (sizeof(A) == 8 ? 0x1p-53 : 0x1p-24) + 0x1p-23);
}

// Best target of one source so far.
template <typename A>
struct Best {
  A approximate;     // highest value of its strips
  float similarity;  // highest cosine
  int64_t target;    // whose
};

// Folds the strip of source `source` and targets [first, first + count) of `rows` into `best`.
template <typename T, typename A = Accumulate<T>>
static void choose(const Similarities<T>& p, const T* sample, const Length* lengths, int64_t source,
                   const int64_t* rows, int64_t count, const A* strip, A margin, Best<A>& best) {
  Vector<A> running = broadcast(best.approximate);
  const int64_t whole = count - count % LANES<A>;
  for (int64_t j = 0; j < whole; j += LANES<A>) {
    const Vector<A> v = load(strip + j);
    running = running < v ? v : running;
  }
  A lanes[LANES<A>], highest = best.approximate;
  store(lanes, running);
  for (int k = 0; k < LANES<A>; ++k) highest = highest < lanes[k] ? lanes[k] : highest;
  for (int64_t j = whole; j < count; ++j) highest = highest < strip[j] ? strip[j] : highest;
  best.approximate = highest;

  const A least = highest - margin;
  for (int64_t j = 0; j < count; ++j) {
    if (strip[j] < least) continue;
    float cosine = 0;
    if constexpr (sizeof(T) == 8) {
      cosine = float(strip[j]);
    } else if (const double norms = lengths[source].norm * lengths[rows[j]].norm; norms > 0) {
      const T *a = sample + source * p.stride_token, *b = sample + rows[j] * p.stride_token;
      cosine = float(exact_product(a, b, p.width) / norms);
    }
    if (cosine > best.similarity) {
      best.similarity = cosine;
      best.target = (rows[j] - p.first_target()) / 2;
    }
  }
}

static inline int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

template <typename T, typename A = Accumulate<T>>
static void similarities(const Similarities<T>& p, int64_t begin, int64_t end) {
  constexpr int COLUMNS = MATCH_COLUMNS<A>;
  const int64_t group = p.group(), targets = p.targets();
  const int64_t fitting = p.PANEL / p.row_bytes() / COLUMNS * COLUMNS;
  const int64_t most = fitting < COLUMNS ? COLUMNS : fitting < 512 ? fitting : 512;
  const int64_t block = most < targets ? most : rounded_up(targets, COLUMNS);
  Scratch source_memory(size_t(rounded_up(group, MATCH_ROWS) * p.row_bytes()));
  Scratch target_memory(size_t(block * p.row_bytes())), strip_memory(size_t(MATCH_ROWS * block) * sizeof(A));
  Scratch length_memory(size_t(p.tokens) * sizeof(Length)), best_memory(size_t(group) * sizeof(Best<A>));
  Scratch row_memory(size_t(group + targets) * sizeof(int64_t));
  A *source_panel = source_memory.as<A>(), *target_panel = target_memory.as<A>(), *strip = strip_memory.as<A>();
  Length* lengths = length_memory.as<Length>();
  Best<A>* best = best_memory.as<Best<A>>();
  int64_t *source_rows = row_memory.as<int64_t>(), *target_rows = source_rows + group;
  const A margin = tolerance<A>(p.width);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.groups(), first = task % p.groups() * group;
    const int64_t last = first + group < p.sources() ? first + group : p.sources();
    const T* sample = p.metric + b * p.stride_batch;
    int64_t source_count = 0, target_count = 0;
    for (int64_t t = 0; t < targets; ++t) {
      const int64_t n = p.first_target() + 2 * t;
      if (p.real(b, n)) target_rows[target_count++] = n;
    }
    for (int64_t s = first; s < last; ++s) {
      const int64_t n = p.first_source() + 2 * s;
      p.similarity[b * p.sources() + s] = -HUGE_VALF;
      p.best[b * p.sources() + s] = 0;
      if (p.real(b, n) && target_count > 0) source_rows[source_count++] = n;
    }
    for (int64_t k = 0; k < source_count; ++k) {
      lengths[source_rows[k]] = length_of(sample + source_rows[k] * p.stride_token, p.width);
      best[k] = {A(-4), -HUGE_VALF, 0};  // less than any cosine
    }
    pack<MATCH_ROWS, T>(sample, p.stride_token, source_rows, lengths, source_count, p.width, source_panel);

    for (int64_t from = 0; source_count > 0 && from < target_count; from += block) {
      const int64_t* rows = target_rows + from;
      const int64_t count = target_count - from < block ? target_count - from : block;
      for (int64_t j = 0; j < count; ++j) {
        lengths[rows[j]] = length_of(sample + rows[j] * p.stride_token, p.width);
      }
      pack<COLUMNS, T>(sample, p.stride_token, rows, lengths, count, p.width, target_panel);
      for (int64_t k = 0; k < source_count; k += MATCH_ROWS) {
        const A* source_tile = source_panel + k * p.width;
        for (int64_t j = 0; j < count; j += COLUMNS) {
          if (count - j > LANES<A>) {
            multiply<MATCH_VECTORS>(source_tile, target_panel + j * p.width, p.width, strip + j, block);
          } else {
            multiply<1>(source_tile, target_panel + j * p.width, p.width, strip + j, block);
          }
        }
        for (int64_t i = 0; i < MATCH_ROWS && k + i < source_count; ++i) {
          choose<T>(p, sample, lengths, source_rows[k + i], rows, count, strip + i * block, margin, best[k + i]);
        }
      }
    }
    for (int64_t k = 0; k < source_count; ++k) {
      const int64_t s = b * p.sources() + (source_rows[k] - p.first_source()) / 2;
      p.similarity[s] = best[k].similarity;
      p.best[s] = best[k].target;
    }
  }
}
