// A matrix along one axis of the grid, factored so that it costs fewer multiplications.
//
// The matrices of the spectral family are full of symmetries. A row of the DCT is even or odd under n -> N - 1 - n, so
// it needs only the sums or the differences of mirrored inputs: two matrices of half the size. The even half of a
// DCT-II is a DCT-II again. The Fourier matrices have the mirror n -> N - n, transposed matrices have the mirror on
// their outputs, a resize and the complex FFT have it on both sides. An AxisTransform finds these symmetries by
// comparing entries (mirrored entries are bitwise equal up to their sign), applies them as often as it can, and leaves
//
//   matrix = (sums and differences of outputs) (dense blocks) (sums and differences of inputs)
//
// Multiplications per output, along an axis of 14, 16, 24, 32: 5.3, 6, 9, 11 for the DCT instead of 14, 16, 24, 32. A
// matrix without symmetry is one dense block.
//
// The side lengths of common grids have code of their own in float, unrolled by a tree of symmetries known at compile
// time, with all inputs in registers. axis_transform.cpp finds the factors, axis_transform_apply.cpp multiplies.
#ifndef MLIP_CPU_SPECTRAL_AXIS_TRANSFORM_H
#define MLIP_CPU_SPECTRAL_AXIS_TRANSFORM_H
#include <cstdint>
#include <utility>
#include <vector>

namespace mlip::cpu {

// Trees of symmetries. A tree stands for a square matrix of its size: Dense has no symmetry; the rows of a Fold are even
// and odd, in turn, under n -> SIZE - 1 - n: the even rows are the tree Even of sums, the odd rows the tree Odd of
// differences. The transposed matrix has the same tree. Coefficients are those of Even, then those of Odd; row by row
// in a Dense.
template <int N>
struct Dense {
  static constexpr int SIZE = N, COEFFICIENTS = N * N;
};

template <class EVEN, class ODD>
struct Fold {
  using Even = EVEN;
  using Odd = ODD;
  static constexpr int SIZE = Even::SIZE + Odd::SIZE, COEFFICIENTS = Even::COEFFICIENTS + Odd::COEFFICIENTS;
};

constexpr int SMALLEST_FOLD = 4;  // below, the additions cost what the multiplications would

// DCT-II: cos(pi k (2 n + 1) / 2 N). The even rows are the DCT-II of half the size.
template <int N, bool FOLDS = (N >= SMALLEST_FOLD), bool AGAIN = (N % 2 == 0)>
struct CosineTree {
  using type = Dense<N>;
};
template <int N>
struct CosineTree<N, true, false> {
  using type = Fold<Dense<N / 2 + 1>, Dense<N / 2>>;
};
template <int N>
struct CosineTree<N, true, true> {
  using type = Fold<typename CosineTree<N / 2>::type, Dense<N / 2>>;
};

template <int N>
using Cosine = typename CosineTree<N>::type;

// cos(2 pi k n / N) for 0 <= k, n <= N / 2. For even N, rows are even and odd in turn, and the even ones are those of
// N / 2.
template <int N, bool EVEN = N % 2 == 0>
struct FourierCosineTree {
  using type = Dense<N / 2 + 1>;
};
template <int N>
struct FourierCosineTree<N, true> {
  using type = Fold<typename FourierCosineTree<N / 2>::type, Dense<(N / 2 + 1) / 2>>;
};
// sin(2 pi k n / N) for 0 < k, n < N / 2.
template <int N, bool EVEN = N % 2 == 0>
struct FourierSineTree {
  using type = Dense<(N - 1) / 2>;
};
template <int N>
struct FourierSineTree<N, true> {
  using type = Fold<Dense<N / 4>, typename FourierSineTree<N / 2>::type>;
};
template <>
struct FourierSineTree<4, true> {
  using type = Dense<1>;
};

// The real Fourier transform, see `AxisTransform::real_fourier`: coefficients of the cosines, then those of the sines.
template <int N>
struct RealFourier {
  using Cosines = typename FourierCosineTree<N>::type;
  using Sines = typename FourierSineTree<N>::type;
};

// The unrolled lengths: MLIP_UNROLLED_LENGTHS(macro) is macro(7) macro(8) ...
#define MLIP_UNROLLED_LENGTHS(MACRO) MACRO(7) MACRO(8) MACRO(14) MACRO(16) MACRO(24) MACRO(27) MACRO(32)

// Which unrolled code applies the transform.
enum class Unrolled { no, cosine, cosine_transposed, fourier, fourier_transposed };

// A dense matrix anywhere in memory: entry (m, n) is at data[m * stride_row + n * stride_column].
template <typename A>
struct Matrix {
  const A* data;
  int64_t rows, columns, stride_row, stride_column;
};

// Lanes of the longest vectors, those of AVX-512.
template <typename A>
constexpr int64_t MOST_LANES = 64 / sizeof(A);

// Channels that a task takes through the grid together: 256 bytes of every token in float32, so that neither the
// memory nor the translation of addresses sees single cache lines.
constexpr int64_t BLOCK_CHANNELS = 64;

// Outputs of more bytes than this go past the caches: they would not stay there until somebody reads them.
constexpr int64_t STREAMED_BYTES = int64_t(1) << 22;

// Whether rows of `channels` elements of an output can leave that way, and whether there are enough of them.
template <typename T>
bool can_stream(const T* output, int64_t rows, int64_t channels) {
  const int64_t row = channels * int64_t(sizeof(T));
  return rows * row >= STREAMED_BYTES && row % 64 == 0 && reinterpret_cast<uintptr_t>(output) % 64 == 0;
}

// Elements along an axis: element i at first + i * stride, elements from `split` on at second + (i - split) * stride
// (imaginary parts).
template <typename T>
struct Strided {
  T* first;
  int64_t stride;
  T* second = nullptr;
  int64_t split = INT64_MAX;

  __attribute__((always_inline)) T* operator[](int64_t i) const {
    return i < split ? first + i * stride : second + (i - split) * stride;
  }
};

template <typename A>
class AxisTransform {
 public:
  // Rows of a block that are computed together: with 4 vectors of channels they fill the registers of AVX-512.
  static constexpr int PANEL = 6;

  // Slots a and b become a + b and a - b.
  struct Pair {
    int32_t a, b;
  };
  // Two inputs (or outputs) and the slots of their sum and difference.
  struct Folded {
    int32_t first, second;
    Pair slots;
  };
  // An input (or output) by itself.
  struct Single {
    int32_t index, slot;
  };
  // Output slots [row, row + rows) from input slots [column, column + columns). The coefficients lie in panels: of
  // `rows` rows, spread evenly over as few panels of at most PANEL rows as possible, each [columns, rows of the panel].
  struct Block {
    int32_t row, rows, column, columns;
    const A* coefficients;
  };
  // What kernels read: pointers, no functions of the standard library compiled for their instruction set.
  template <typename Item>
  class List {
   public:
    const Item* items = nullptr;
    int64_t count = 0;
    const Item* begin() const { return items; }
    const Item* end() const { return items + count; }
    void take(std::vector<Item>&& from) {
      memory = std::move(from);
      items = memory.data(), count = int64_t(memory.size());
    }

   private:
    std::vector<Item> memory;
  };

  // No transform along this axis: no inputs and no outputs.
  AxisTransform() = default;
  // y_m = sum_n matrix[m, n] x_n.
  explicit AxisTransform(const Matrix<A>& matrix);
  // The complex transform with these real and imaginary parts [M, N]: inputs are N real, then N imaginary parts;
  // outputs are M real, then M imaginary parts.
  AxisTransform(const Matrix<A>& real, const Matrix<A>& imaginary);
  // The real FFT as N numbers instead of N / 2 + 1 complex ones of which some are 0, or its transpose:
  //
  //   cosines   c_k = sum_n cos(2 pi k n / N) x_n at k     for k = 0 .. N / 2
  //   sines     s_k = -sum_n sin(2 pi k n / N) x_n at N - k for 0 < k < N / 2
  //
  // both scaled alike, from row k and column n of the matrices `cosine` and `sine`, of at least N / 2 + 1 rows and N
  // columns. Along both axes of a grid this is a real transform, the same for every plane, and twice as cheap as
  // complex columns; two numbers of opposite columns and rows make a complex coefficient (cpu/spectral/spectrum.h).
  static AxisTransform real_fourier(const Matrix<A>& cosine, const Matrix<A>& sine, bool transpose);

  AxisTransform(AxisTransform&&) = default;  // pointers into the vectors stay valid
  AxisTransform& operator=(AxisTransform&&) = default;

  int64_t inputs = 0, outputs = 0;

  Unrolled unrolled = Unrolled::no;
  const A* tree = nullptr;  // coefficients in the order of the tree, where unrolled

  // Otherwise, in the order of execution. An input takes part in at most one of input_folds and input_singles.
  List<Folded> input_folds;
  List<Single> input_singles;
  List<Pair> input_pairs;  // the second and further levels, among slots
  List<Block> blocks;
  List<Pair> output_pairs;
  List<Folded> output_folds;
  List<Single> output_singles;  // by slot; without folds and pairs, slot i is that of item i

  // Elements of type A that applying the transform needs as scratch, whatever the instruction set, and those with which
  // it can stream its outputs for a block of channels.
  int64_t scratch() const { return (inputs + outputs) * 4 * MOST_LANES<A>; }
  int64_t streaming_scratch() const { return scratch() + outputs * BLOCK_CHANNELS; }

 private:
  void factor(std::vector<A> matrix, int64_t rows, int64_t columns);

  std::vector<A> coefficients;
};

}  // namespace mlip::cpu
#endif

// What kernels see: included again, once per instruction set (cpu/simd.h).
#ifdef MLIP_VECTOR_BYTES

// y = axis(x) for `vectors` consecutive vectors of channels, at most BLOCK_CHANNELS channels. x and y may be of any
// element type that accumulates in A, and may be the same memory. `scratch` holds axis.scratch() elements, aligned to
// vectors. Compiled in axis_transform_apply.cpp only.
template <typename In, typename Out, typename A>
void transform(const AxisTransform<A>& axis, Strided<const In> x, Strided<Out> y, int64_t vectors, A* scratch);

// Stores a position's channels past the caches, where they will not be read soon: its cache lines are not read first.
template <typename T, typename A>
static inline void stream_channels(T* to, const A* from, int64_t channels) {
  for (int64_t d = 0; d < channels; d += LANES<A>) stream(to + d, load(from + d));
}

// `transform`, whose outputs leave through a buffer behind the scratch of the axis if `streamed`.
template <typename In, typename Out, typename A>
static void transform_to(bool streamed, const AxisTransform<A>& axis, const Strided<const In>& x, const Strided<Out>& y,
                         int64_t vectors, A* scratch) {
  if (!streamed) {
    transform<In, Out, A>(axis, x, y, vectors, scratch);
    return;
  }
  A* buffer = scratch + axis.scratch();
  const int64_t point = vectors * LANES<A>;
  transform<In, A, A>(axis, x, {buffer, point}, vectors, scratch);
  for (int64_t m = 0; m < axis.outputs; ++m) stream_channels(y[m], buffer + m * point, point);
}

// Asks for `channels` channels of a row of tokens that will be read soon. Always inlined: GCC takes a function that only
// prefetches for one without effects, and drops calls of it.
template <typename T>
static inline __attribute__((always_inline)) void prefetch(const T* tokens, int64_t stride, int64_t count,
                                                           int64_t channels) {
  for (int64_t n = 0; n < count; ++n) {
    const char* from = reinterpret_cast<const char*>(tokens + n * stride);
    for (int64_t i = 0; i < channels * int64_t(sizeof(T)); i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

#endif
