// A linear map along one axis of the grid, taken apart so that it costs fewer multiplications.
//
// The matrices of the family are full of symmetries. A row of the DCT is even or odd under n -> N - 1 - n, so it needs
// only the sums or the differences of mirrored inputs: two matrices of half the size. The even half of a DCT-II is a
// DCT-II again. The Fourier matrices have the mirror n -> N - n, transposed matrices have the mirror on their outputs,
// a resize and the complex FFT have it on both sides. A Line finds all of this by comparing entries (mirrored ones
// are bitwise equal up to their sign), as often as it applies, and leaves
//
//   matrix = (sums and differences of outputs) (dense blocks) (sums and differences of inputs)
//
// Multiplications per output, along an axis of 14, 16, 24, 32: 5.3, 6, 9, 11 for the DCT instead of 14, 16, 24, 32. A
// matrix without symmetry is one dense block.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/spectral/trees.h"

namespace mlip::cpu {

// What is applied by code compiled for the length of the axis (cpu/spectral/lines_short_kernels.h).
enum class Compiled { no, cosine, cosine_transposed };

// Whether there is such code: for float, where vectors are longer than those of every processor.
template <typename A>
bool has_short_lines();

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

template <typename A>
class Line {
 public:
  // Rows of a block that are computed together: with 4 vectors of channels they fill the registers of AVX-512.
  static constexpr int PANEL = 6;

  // Slots a and b become a + b and a - b.
  struct Pair {
    int32_t a, b;
  };
  // Two inputs (or outputs) and the slots of their sum and difference.
  struct Fold {
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
  template <typename Item>
  struct List {
    const Item* items;
    int64_t count;
    const Item* begin() const { return items; }
    const Item* end() const { return items + count; }
  };

  // An empty line: no map at all.
  Line() = default;
  // The map y_m = sum_n matrix[m, n] x_n.
  explicit Line(const Matrix<A>& matrix);
  // The complex map with these real and imaginary parts [M, N]: inputs are N real, then N imaginary parts; outputs
  // are M real, then M imaginary parts.
  Line(const Matrix<A>& real, const Matrix<A>& imaginary);
  Line(Line&&) = default;  // pointers into the vectors stay valid
  Line& operator=(Line&&) = default;

  int64_t inputs = 0, outputs = 0;

  Compiled compiled = Compiled::no;
  const A* compiled_coefficients = nullptr;  // in the order of the tree

  // In the order of execution. An input takes part in at most one of input_folds and input_singles.
  List<Fold> input_folds{};
  List<Single> input_singles{};
  List<Pair> input_pairs{};  // the second and further levels, among slots
  List<Block> blocks{};
  List<Pair> output_pairs{};
  List<Fold> output_folds{};
  List<Single> output_singles{};  // by slot; without folds and pairs, slot i is that of item i

  // Elements of type A that applying the line needs as scratch, whatever the instruction set, and those with which it
  // can stream its outputs for a block of channels.
  int64_t scratch() const { return (inputs + outputs) * 4 * MOST_LANES<A>; }
  int64_t streaming_scratch() const { return scratch() + outputs * BLOCK_CHANNELS; }

 private:
  void factor(std::vector<A> matrix, int64_t rows, int64_t columns);

  std::vector<Fold> input_fold_list, output_fold_list;
  std::vector<Single> input_single_list, output_single_list;
  std::vector<Pair> input_pair_list, output_pair_list;
  std::vector<Block> block_list;
  std::vector<A> coefficients, tree_coefficients;
};

}  // namespace mlip::cpu
