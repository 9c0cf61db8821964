// Operands of the products of tokens, packed for the micro-kernel, and the micro-kernel. Included by *_kernels.h.
//
// A column strip is LANES tokens side by side, [steps][LANES]: a vector per step. A row tile is R tokens,
// [steps][R]: the kernel broadcasts one element at a time. A step is one channel, or the two channels that one
// instruction multiplies and adds where MLIP_BF16_DOT says that bfloat16 has it. Half precision is widened while it is
// packed: its products are exact in float. The instruction takes subnormal numbers as 0.

#define MLIP_FULLY_UNROLLED _Pragma("GCC unroll 32")
#define MLIP_FORCED static inline __attribute__((always_inline))

template <typename T>
struct Operand {
  using Element = Accumulate<T>;
  static constexpr int64_t CHANNELS = 1;  // per step
};

template <typename T>
using Element = typename Operand<T>::Element;

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
template <>
struct Operand<BFloat16> {
  using Element = uint32_t;
  static constexpr int64_t CHANNELS = 2;
};

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

// Token after token, the elements of each `stride` apart.
template <typename T>
MLIP_FORCED void pack_token(const T* token, int64_t channels, int64_t stride, Element<T>* to, Element<T>* room) {
  const Element<T>* from = elements(token, channels, room);
  const int64_t steps = (channels + Operand<T>::CHANNELS - 1) / Operand<T>::CHANNELS;
  for (int64_t k = 0; k < steps; ++k) to[k * stride] = from[k];
}

// Steps whose products are added up in registers before they reach the similarity: sums of sums round less than one
// long sum, and 256 channels of a row tile and its strips fit the first-level cache.
template <typename T>
constexpr int64_t RUN = 256 / Operand<T>::CHANNELS;

// similarity[v][r] = <row r, column strip v>, vectors of LANES columns; strips of the result lie `stride` apart.
template <typename T, int V, int R>
static void similarities(const Element<T>* rows, const Element<T>* strips, int64_t steps, Accumulate<T>* similarity,
                         int64_t stride) {
  using A = Accumulate<T>;
  for (int64_t begin = 0; begin < steps; begin += RUN<T>) {
    const int64_t end = begin + RUN<T> < steps ? begin + RUN<T> : steps;
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

template <typename T, int V, int... R>
MLIP_FORCED void similarities_of(int64_t count, std::integer_sequence<int, R...>, const Element<T>* rows,
                                 const Element<T>* strips, int64_t steps, Accumulate<T>* similarity, int64_t stride) {
  using Kernel = void (*)(const Element<T>*, const Element<T>*, int64_t, Accumulate<T>*, int64_t);
  static constexpr Kernel KERNELS[] = {similarities<T, V, R + 1>...};
  KERNELS[count - 1](rows, strips, steps, similarity, stride);
}

// Rows are cut into tiles of nearly the same size: a tile of a single row would wait for its own sums.
struct RowTiles {
  int64_t tiles, size, larger;  // the first `larger` tiles have size + 1 rows
  explicit RowTiles(int64_t rows)
      : tiles((rows + TILE_ROWS - 1) / TILE_ROWS), size(rows / (tiles ? tiles : 1)), larger(rows - size * tiles) {}
  int64_t begin(int64_t tile) const { return tile * size + (tile < larger ? tile : larger); }
};
