// Finds the symmetries of a matrix: factors it, or packs the coefficients of unrolled code.
#include "cpu/spectral/axis_transform.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>

#include "cpu/simd.h"

namespace mlip::cpu {
namespace {

using Indices = std::vector<int32_t>;

constexpr int64_t SMALLEST = 5;  // blocks with fewer rows or columns stay: a fold would save less than it costs

Indices range(int64_t first, int64_t last) {
  Indices result(size_t(last - first));
  std::iota(result.begin(), result.end(), int32_t(first));
  return result;
}

// A part of the matrix: output slots `rows` from input slots `columns`, entry (m, n) at matrix[m * columns.size() + n].
template <typename A>
struct Part {
  Indices rows, columns;
  std::vector<A> matrix;

  A at(int64_t m, int64_t n) const { return matrix[size_t(m) * columns.size() + size_t(n)]; }
  int64_t height() const { return int64_t(rows.size()); }
  int64_t width() const { return int64_t(columns.size()); }
};

// A mirror image of the indices of an axis.
enum class Mirror { reversed, periodic, periodic_halves };

int64_t mirrored(Mirror mirror, int64_t i, int64_t count) {
  switch (mirror) {
    case Mirror::reversed:
      return count - 1 - i;
    case Mirror::periodic:
      return i == 0 ? 0 : count - i;
    default: {
      const int64_t half = count / 2, start = i < half ? 0 : half;
      return start + (i == start ? 0 : half - (i - start));
    }
  }
}

// Indices that are no larger than their image (they stand for sums), and those of them that are smaller (differences).
std::pair<Indices, Indices> representatives(Mirror mirror, int64_t count) {
  std::pair<Indices, Indices> found;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = mirrored(mirror, i, count);
    if (i <= image) found.first.push_back(int32_t(i));
    if (i < image) found.second.push_back(int32_t(i));
  }
  return found;
}

template <typename A>
Part<A> transposed(const Part<A>& part) {
  Part<A> result{part.columns, part.rows, std::vector<A>(part.matrix.size())};
  for (int64_t m = 0; m < part.height(); ++m) {
    for (int64_t n = 0; n < part.width(); ++n) result.matrix[size_t(n * part.height() + m)] = part.at(m, n);
  }
  return result;
}

template <typename A>
Part<A> selected(const Part<A>& part, const Indices& rows, const Indices& columns) {
  Part<A> result;
  for (const int32_t m : rows) result.rows.push_back(part.rows[size_t(m)]);
  for (const int32_t n : columns) result.columns.push_back(part.columns[size_t(n)]);
  for (const int32_t m : rows) {
    for (const int32_t n : columns) result.matrix.push_back(part.at(m, n));
  }
  return result;
}

// Rows that are even and rows that are odd under the mirror; false if one is neither.
template <typename A>
bool parities(const Part<A>& part, Mirror mirror, Indices& even, Indices& odd) {
  const int64_t width = part.width();
  for (int64_t m = 0; m < part.height(); ++m) {
    bool is_even = true, is_odd = true;
    for (int64_t n = 0; n < width && (is_even || is_odd); ++n) {
      const A entry = part.at(m, n), image = part.at(m, mirrored(mirror, n, width));
      is_even = is_even && entry == image;
      is_odd = is_odd && entry == -image;
    }
    if (!is_even && !is_odd) return false;
    (is_even ? even : odd).push_back(int32_t(m));
  }
  return true;
}

template <typename A>
bool same_under(const Part<A>& part, Mirror mirror) {
  for (int64_t m = 0; m < part.height(); ++m) {
    const int64_t m_image = mirrored(mirror, m, part.height());
    for (int64_t n = 0; n < part.width(); ++n) {
      if (part.at(m, n) != part.at(m_image, mirrored(mirror, n, part.width()))) return false;
    }
  }
  return true;
}

// Factors a matrix; slots are the inputs and outputs themselves until `AxisTransform` numbers them anew.
template <typename A>
class Factorization {
 public:
  using Pair = typename AxisTransform<A>::Pair;
  struct Level {
    int64_t depth;
    Pair slots;
  };

  std::vector<Level> input, output;  // outer levels first
  std::vector<Part<A>> blocks;

  void split(const Part<A>& part, int64_t input_depth, int64_t output_depth) {
    if (split_by_zeros(part, input_depth, output_depth)) return;
    if (std::min(part.height(), part.width()) >= SMALLEST) {
      for (const Mirror mirror : {Mirror::reversed, Mirror::periodic}) {
        if (fold_side(true, part, mirror, input_depth, output_depth)) return;
      }
      const Part<A> flipped = transposed(part);
      for (const Mirror mirror : {Mirror::reversed, Mirror::periodic}) {
        if (fold_side(false, flipped, mirror, input_depth, output_depth)) return;
      }
      for (const Mirror mirror : {Mirror::reversed, Mirror::periodic, Mirror::periodic_halves}) {
        if (fold_both(part, mirror, input_depth, output_depth)) return;
      }
    }
    blocks.push_back(part);
  }

 private:
  // Rows and columns that share no non-zero entry with the others are a matrix of their own; a row of zeros has no
  // columns and a column of zeros is read by nobody.
  bool split_by_zeros(const Part<A>& part, int64_t input_depth, int64_t output_depth) {
    const int64_t height = part.height(), width = part.width();
    Indices group(size_t(height + width));
    std::iota(group.begin(), group.end(), 0);
    const auto find = [&](int64_t i) {
      while (group[size_t(i)] != i) i = group[size_t(i)] = group[size_t(group[size_t(i)])];
      return i;
    };
    int64_t groups = height + width;
    for (int64_t m = 0; m < height && groups > 1; ++m) {
      for (int64_t n = 0; n < width; ++n) {
        if (part.at(m, n) == 0) continue;
        const int64_t a = find(m), b = find(height + n);
        if (a != b) group[size_t(std::max(a, b))] = int32_t(std::min(a, b)), --groups;
      }
    }
    if (groups == 1 || width == 0) return false;
    for (int64_t root = 0; root < height; ++root) {  // the smallest of a group with rows is a row
      if (find(root) != root) continue;
      Indices rows, columns;
      for (int64_t m = 0; m < height; ++m) {
        if (find(m) == root) rows.push_back(int32_t(m));
      }
      for (int64_t n = 0; n < width; ++n) {
        if (find(height + n) == root) columns.push_back(int32_t(n));
      }
      const Part<A> piece = selected(part, rows, columns);
      columns.empty() ? blocks.push_back(piece) : split(piece, input_depth, output_depth);
    }
    return true;
  }

  static Indices images(const Indices& indices, Mirror mirror, int64_t count) {
    Indices result;
    for (const int32_t i : indices) result.push_back(int32_t(mirrored(mirror, i, count)));
    return result;
  }

  // Adds the pairs of mirrored slots to the levels.
  static void note(std::vector<Level>& levels, int64_t depth, const Indices& slots, const Indices& differences,
                   Mirror mirror) {
    for (const int32_t i : differences) {
      const int64_t image = mirrored(mirror, i, int64_t(slots.size()));
      levels.push_back({depth, {slots[size_t(i)], slots[size_t(image)]}});
    }
  }

  // Folds inputs, or outputs, for which `part` is transposed. After the fold a sum lies in the slot of the first of a
  // pair, a difference in that of the second.
  bool fold_side(bool inputs, const Part<A>& part, Mirror mirror, int64_t input_depth, int64_t output_depth) {
    Indices even, odd;
    if (!parities(part, mirror, even, odd)) return false;
    const auto [sums, differences] = representatives(mirror, part.width());
    note(inputs ? input : output, inputs ? input_depth : output_depth, part.columns, differences, mirror);
    Part<A> odd_part = selected(part, odd, differences);
    odd_part.columns = selected(part, {}, images(differences, mirror, part.width())).columns;
    const Part<A> even_part = selected(part, even, sums);
    split(inputs ? even_part : transposed(even_part), input_depth + inputs, output_depth + !inputs);
    split(inputs ? odd_part : transposed(odd_part), input_depth + inputs, output_depth + !inputs);
    return true;
  }

  bool fold_both(const Part<A>& part, Mirror mirror, int64_t input_depth, int64_t output_depth) {
    const int64_t height = part.height(), width = part.width();
    if (mirror == Mirror::periodic_halves && (height % 2 || width % 2)) return false;
    if (!same_under(part, mirror)) return false;
    const auto [row_sums, row_differences] = representatives(mirror, height);
    const auto [sums, differences] = representatives(mirror, width);
    note(input, input_depth, part.columns, differences, mirror);
    note(output, output_depth, part.rows, row_differences, mirror);
    Part<A> mixed = part;
    for (int64_t m = 0; m < height; ++m) {
      for (const int32_t n : differences) {
        const int64_t image = mirrored(mirror, n, width);
        const A first = part.at(m, n), second = part.at(m, image);
        mixed.matrix[size_t(m * width + n)] = (first + second) / 2;
        mixed.matrix[size_t(m * width + image)] = (first - second) / 2;
      }
    }
    Part<A> odd_part = selected(mixed, row_differences, images(differences, mirror, width));
    odd_part.rows = selected(part, images(row_differences, mirror, height), {}).rows;
    split(selected(mixed, row_sums, sums), input_depth + 1, output_depth + 1);
    split(odd_part, input_depth + 1, output_depth + 1);
    return true;
  }
};

// Levels become the folds of inputs (or outputs) of depth 0, the pairs of slots below them, and the single rest.
template <typename A>
struct Numbered {
  std::vector<typename AxisTransform<A>::Folded> folds;
  std::vector<typename AxisTransform<A>::Single> singles;
  std::vector<typename AxisTransform<A>::Pair> pairs;

  Numbered(const std::vector<typename Factorization<A>::Level>& levels, const Indices& slot_of) {
    std::vector<bool> folded(slot_of.size());
    for (const auto& [depth, at] : levels) {
      const typename AxisTransform<A>::Pair slots{slot_of[size_t(at.a)], slot_of[size_t(at.b)]};
      if (depth > 0) {
        pairs.push_back(slots);
        continue;
      }
      folds.push_back({at.a, at.b, slots});
      folded[size_t(at.a)] = folded[size_t(at.b)] = true;
    }
    for (size_t i = 0; i < slot_of.size(); ++i) {
      if (!folded[i]) singles.push_back({int32_t(i), slot_of[i]});
    }
  }
};

// Appends the coefficients of rows and columns of a matrix, or of its transpose, in the order of a tree; false if it
// lacks a symmetry of the tree.
template <typename A, class Tree>
struct Pack;

template <typename A, int N>
struct Pack<A, Dense<N>> {
  static bool into(std::vector<A>& tree, const Part<A>& part, const Indices& rows, const Indices& columns,
                   bool transpose) {
    for (int m = 0; m < N; ++m) {
      for (int n = 0; n < N; ++n) {
        tree.push_back(part.at(rows[size_t(transpose ? n : m)], columns[size_t(transpose ? m : n)]));
      }
    }
    return true;
  }
};

template <typename A, class Even, class Odd>
struct Pack<A, Fold<Even, Odd>> {
  static bool into(std::vector<A>& tree, const Part<A>& part, const Indices& rows, const Indices& columns,
                   bool transpose) {
    Indices even, odd;
    for (size_t m = 0; m < rows.size(); ++m) {
      (m % 2 ? odd : even).push_back(rows[m]);
      for (size_t n = 0; n < columns.size(); ++n) {
        const A entry = part.at(rows[m], columns[n]), image = part.at(rows[m], columns[columns.size() - 1 - n]);
        if (entry != (m % 2 ? -image : image)) return false;
      }
    }
    const Indices sums(columns.begin(), columns.begin() + Even::SIZE);
    const Indices differences(columns.begin(), columns.begin() + Odd::SIZE);
    return Pack<A, Even>::into(tree, part, even, sums, transpose) &&
           Pack<A, Odd>::into(tree, part, odd, differences, transpose);
  }
};

template <typename A, int N>
struct Pack<A, RealFourier<N>> {
  static bool into(std::vector<A>& tree, const Part<A>& part, bool transpose) {
    for (int64_t k = 0; k < N; ++k) {
      for (int64_t n = 1; n < N; ++n) {
        if (part.at(k, n) != (k > N / 2 ? -part.at(k, N - n) : part.at(k, N - n))) return false;
      }
      if (k > N / 2 && part.at(k, 0) != 0) return false;
    }
    const Indices cosines = range(0, N / 2 + 1), sines = range(N / 2 + 1, N);
    const Indices backwards(sines.rbegin(), sines.rend());
    return Pack<A, typename RealFourier<N>::Cosines>::into(tree, part, cosines, cosines, transpose) &&
           Pack<A, typename RealFourier<N>::Sines>::into(tree, part, backwards, range(1, (N + 1) / 2), transpose);
  }
};

// Whether there is unrolled code: for float, where vectors are longer than those of every processor.
template <typename A>
bool has_unrolled() {
  return std::is_same_v<A, float> && (!MLIP_X86 || capability() != Capability::baseline);
}

// Fills `tree` with the coefficients of the unrolled DCT-II (`fourier`: the unrolled real Fourier transform) with this
// matrix, or with the transposed matrix; false if there is none.
template <typename A>
bool pack(std::vector<A>& tree, const Part<A>& part, bool fourier, bool transpose) {
  tree.clear();
  if constexpr (std::is_same_v<A, float>) {
    if (!has_unrolled<A>() || part.height() != part.width()) return false;
    const Indices all = range(0, part.height());
    switch (part.height()) {
#define MLIP_PACK(N)                                                      \
  case N:                                                                 \
    return fourier ? Pack<A, RealFourier<N>>::into(tree, part, transpose) \
                   : Pack<A, Cosine<N>>::into(tree, part, all, all, transpose);
      MLIP_UNROLLED_LENGTHS(MLIP_PACK)
#undef MLIP_PACK
    }
  }
  return false;
}

}  // namespace

template <typename A>
AxisTransform<A>::AxisTransform(const Matrix<A>& matrix) {
  std::vector<A> dense;
  dense.reserve(size_t(matrix.rows * matrix.columns));
  for (int64_t m = 0; m < matrix.rows; ++m) {
    for (int64_t n = 0; n < matrix.columns; ++n) {
      dense.push_back(matrix.data[m * matrix.stride_row + n * matrix.stride_column]);
    }
  }
  factor(std::move(dense), matrix.rows, matrix.columns);
}

template <typename A>
AxisTransform<A>::AxisTransform(const Matrix<A>& real, const Matrix<A>& imaginary) {
  const int64_t rows = real.rows, columns = real.columns;
  std::vector<A> dense(size_t(4 * rows * columns));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      const A cosine = real.data[m * real.stride_row + n * real.stride_column];
      const A sine = imaginary.data[m * imaginary.stride_row + n * imaginary.stride_column];
      A* to_real = dense.data() + m * 2 * columns + n;
      A* to_imaginary = dense.data() + (rows + m) * 2 * columns + n;
      to_real[0] = cosine, to_real[columns] = -sine;
      to_imaginary[0] = sine, to_imaginary[columns] = cosine;
    }
  }
  factor(std::move(dense), 2 * rows, 2 * columns);
}

template <typename A>
AxisTransform<A> AxisTransform<A>::real_fourier(const Matrix<A>& cosine, const Matrix<A>& sine, bool transpose) {
  const int64_t length = cosine.columns;
  Part<A> part{range(0, length), range(0, length), std::vector<A>(size_t(length * length))};
  for (int64_t k = 0; k < length; ++k) {
    const bool is_cosine = k <= length / 2;
    const Matrix<A>& from = is_cosine ? cosine : sine;
    const A* row = from.data + (is_cosine ? k : length - k) * from.stride_row;
    for (int64_t n = 0; n < length; ++n) part.matrix[size_t(k * length + n)] = row[n * from.stride_column];
  }
  AxisTransform result;
  if (pack(result.coefficients, part, true, transpose)) {
    result.inputs = result.outputs = length;
    result.unrolled = transpose ? Unrolled::fourier_transposed : Unrolled::fourier;
    result.tree = result.coefficients.data();
  } else {
    result.factor(transpose ? transposed(part).matrix : part.matrix, length, length);
  }
  return result;
}

template <typename A>
void AxisTransform<A>::factor(std::vector<A> matrix, int64_t rows, int64_t columns) {
  inputs = columns, outputs = rows;
  const Part<A> whole{range(0, rows), range(0, columns), std::move(matrix)};
  if (pack(coefficients, whole, false, false)) {
    unrolled = Unrolled::cosine;
  } else if (has_unrolled<A>() && pack(coefficients, transposed(whole), false, true)) {
    unrolled = Unrolled::cosine_transposed;
  }
  if (unrolled != Unrolled::no) {
    tree = coefficients.data();
    return;
  }
  coefficients.clear();
  Factorization<A> factors;
  factors.split(whole, 0, 0);

  // The slots of a block lie together; inputs that no block reads come last.
  Indices input_slot(size_t(inputs), -1), output_slot(size_t(outputs), -1);
  int32_t next_input = 0, next_output = 0;
  std::vector<Block> block_list;
  std::vector<size_t> starts;
  for (const Part<A>& part : factors.blocks) {
    block_list.push_back({next_output, int32_t(part.height()), next_input, int32_t(part.width()), nullptr});
    starts.push_back(coefficients.size());
    for (const int32_t slot : part.columns) input_slot[size_t(slot)] = next_input++;
    for (const int32_t slot : part.rows) output_slot[size_t(slot)] = next_output++;
    const int64_t panels = (part.height() + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel * part.height() / panels, last = (panel + 1) * part.height() / panels;
      for (int64_t n = 0; n < part.width(); ++n) {
        for (int64_t m = first; m < last; ++m) coefficients.push_back(part.at(m, n));
      }
    }
  }
  for (int32_t& slot : input_slot) slot = slot < 0 ? next_input++ : slot;
  for (size_t i = 0; i < block_list.size(); ++i) block_list[i].coefficients = coefficients.data() + starts[i];

  Numbered<A> of_inputs(factors.input, input_slot), of_outputs(factors.output, output_slot);
  std::reverse(of_outputs.pairs.begin(), of_outputs.pairs.end());
  std::sort(of_outputs.singles.begin(), of_outputs.singles.end(),
            [](const Single& a, const Single& b) { return a.slot < b.slot; });

  input_folds.take(std::move(of_inputs.folds));
  input_singles.take(std::move(of_inputs.singles));
  input_pairs.take(std::move(of_inputs.pairs));
  blocks.take(std::move(block_list));
  output_pairs.take(std::move(of_outputs.pairs));
  output_folds.take(std::move(of_outputs.folds));
  output_singles.take(std::move(of_outputs.singles));
}

template class AxisTransform<float>;
template class AxisTransform<double>;

}  // namespace mlip::cpu
