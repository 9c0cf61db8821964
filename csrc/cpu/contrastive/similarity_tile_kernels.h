// A tile of similarities: the product of packed tokens, and maxima along either axis. Included by *.cpp, once per
// instruction set.
//
// Tokens are packed for the micro-kernel. A column strip is LANES tokens side by side, [steps][LANES]: a vector per
// step. A row tile is R tokens, [steps][R]: the kernel broadcasts one element at a time. A step is one channel, or the
// two channels that one instruction multiplies and adds where MLIP_BF16_DOT says that bfloat16 has it. Half precision
// is widened while it is packed: its products are exact in float. The instruction takes subnormal numbers as 0.
//
// A strip of the tile is [rows][LANES]; its lanes are columns. Both reductions assume finite similarities. The first
// one also sums its input times 0: a sum that is not 0 tells the caller to take the slow path, which handles NaN.

#define MLIP_FULLY_UNROLLED _Pragma("GCC unroll 32")
#define MLIP_FORCED static inline __attribute__((always_inline))

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

template <typename A>
MLIP_FORCED Integers<A> lane_numbers() {
  Integer<A> lane[LANES<A>];
  for (int i = 0; i < LANES<A>; ++i) lane[i] = i;
  Integers<A> lanes;
  std::memcpy(&lanes, lane, sizeof lanes);
  return lanes;
}

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

template <typename T>
struct ElementOf {
  using type = Accumulate<T>;
};
#if MLIP_BF16_DOT
template <>
struct ElementOf<BFloat16> {
  using type = uint32_t;
};
#endif

// What tokens of T are packed as: float, double or pairs of bfloat16.
template <typename T>
using Element = typename ElementOf<T>::type;

// What products of E are summed in.
template <typename E>
using SumOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Channels per step.
template <typename E>
constexpr int64_t CHANNELS = std::is_same_v<E, uint32_t> ? 2 : 1;

// Sums of R x V vectors stay in registers, beside V vectors of columns and one element of a row.
constexpr int TILE_ROWS = MLIP_X86 && MLIP_VECTOR_BYTES < 64 ? 6 : 14;
constexpr int TILE_STRIPS = 2;

template <typename A>
MLIP_FORCED void multiply_add(Vector<A>& sum, A row, const A* columns) {
  sum += broadcast(row) * load(columns);
}

// The elements of a token, one after the other; `room` is for those that must be widened.
MLIP_FORCED const float* elements(const float* token, int64_t, float*) { return token; }
MLIP_FORCED const double* elements(const double* token, int64_t, double*) { return token; }
template <typename T>
MLIP_FORCED const float* elements(const T* token, int64_t channels, float* room) {
  int64_t d = 0;
  for (; d + LANES<float> <= channels; d += LANES<float>) store(room + d, load(token + d));
  if (d < channels) store(room + d, load(token + d, channels - d), channels - d);
  return room;
}

#if MLIP_BF16_DOT
MLIP_FORCED void multiply_add(Vector<float>& sum, uint32_t row, const uint32_t* columns) {
  const __m512bh pairs = (__m512bh)_mm512_loadu_si512(columns);
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(row)), pairs);
}

MLIP_FORCED const uint32_t* elements(const BFloat16* token, int64_t channels, uint32_t* room) {
  room[(channels - 1) / 2] = 0;
  std::memcpy(room, token, size_t(channels) * sizeof(BFloat16));
  return room;
}
#endif

template <typename E>
static int64_t steps_of(int64_t channels) {
  return (channels + CHANNELS<E> - 1) / CHANNELS<E>;
}

// Token after token, the elements of each `stride` apart.
template <typename T>
MLIP_FORCED void pack_token(const T* token, int64_t channels, int64_t stride, Element<T>* to, Element<T>* room) {
  const Element<T>* from = elements(token, channels, room);
  const int64_t steps = steps_of<Element<T>>(channels);
  for (int64_t k = 0; k < steps; ++k) to[k * stride] = from[k];
}

// Steps whose products are added up in registers before they reach the similarity: sums of sums round less than one
// long sum, and 256 channels of a row tile and its strips fit the first-level cache.
template <typename E>
constexpr int64_t RUN = 256 / CHANNELS<E>;

// similarity[v][r] = <row r, column strip v>, vectors of LANES columns; strips of the result lie `stride` apart.
template <typename E, int V, int R>
static void similarities(const E* rows, const E* strips, int64_t steps, SumOf<E>* similarity, int64_t stride) {
  using A = SumOf<E>;
  for (int64_t begin = 0; begin < steps; begin += RUN<E>) {
    const int64_t end = begin + RUN<E> < steps ? begin + RUN<E> : steps;
    Vector<A> sums[R][V] = {};
    for (int64_t k = begin; k < end; ++k) {
      MLIP_FULLY_UNROLLED for (int r = 0; r < R; ++r) {
        MLIP_FULLY_UNROLLED for (int v = 0; v < V; ++v) {
          multiply_add(sums[r][v], rows[k * R + r], strips + (v * steps + k) * LANES<A>);
        }
      }
    }
    MLIP_FULLY_UNROLLED for (int r = 0; r < R; ++r) {
      MLIP_FULLY_UNROLLED for (int v = 0; v < V; ++v) {
        A* to = similarity + v * stride + r * LANES<A>;
        store(to, begin == 0 ? sums[r][v] : load(to) + sums[r][v]);
      }
    }
  }
}

template <typename E, int V, int... R>
MLIP_FORCED void similarities_of(int64_t count, std::integer_sequence<int, R...>, const E* rows, const E* strips,
                                 int64_t steps, SumOf<E>* similarity, int64_t stride) {
  using Kernel = void (*)(const E*, const E*, int64_t, SumOf<E>*, int64_t);
  static constexpr Kernel KERNELS[] = {similarities<E, V, R + 1>...};
  KERNELS[count - 1](rows, strips, steps, similarity, stride);
}

// Rows are cut into tiles of nearly the same size: a tile of a single row would wait for its own sums.
struct RowTiles {
  int64_t tiles, size, larger;  // the first `larger` tiles have size + 1 rows
  explicit RowTiles(int64_t rows)
      : tiles((rows + TILE_ROWS - 1) / TILE_ROWS), size(rows / (tiles ? tiles : 1)), larger(rows - size * tiles) {}
  int64_t begin(int64_t tile) const { return tile * size + (tile < larger ? tile : larger); }
};

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
