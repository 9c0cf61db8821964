#include "cpu/spectral/fourier_line.h"

namespace mlip::cpu {
namespace {

using std::size_t;
using Indices = std::vector<int64_t>;

// Appends the coefficients of rows and columns of a matrix, or of its transpose, in the order of a tree; false if it
// lacks a symmetry.
template <typename A, typename Tree>
struct Pack;

template <typename A, int N>
struct Pack<A, Dense<N>> {
  static bool into(std::vector<A>& to, const std::vector<A>& matrix, int64_t stride, const Indices& rows,
                   const Indices& columns, bool transpose) {
    for (int m = 0; m < N; ++m) {
      for (int n = 0; n < N; ++n) {
        const int64_t row = rows[size_t(transpose ? n : m)], column = columns[size_t(transpose ? m : n)];
        to.push_back(matrix[size_t(row * stride + column)]);
      }
    }
    return true;
  }
};

template <typename A, class Even, class Odd>
struct Pack<A, Fold<Even, Odd>> {
  static bool into(std::vector<A>& to, const std::vector<A>& matrix, int64_t stride, const Indices& rows,
                   const Indices& columns, bool transpose) {
    Indices even, odd;
    for (size_t m = 0; m < rows.size(); ++m) {
      (m % 2 ? odd : even).push_back(rows[m]);
      for (size_t n = 0; n < columns.size(); ++n) {
        const A entry = matrix[size_t(rows[m] * stride + columns[n])];
        const A image = matrix[size_t(rows[m] * stride + columns[columns.size() - 1 - n])];
        if (entry != (m % 2 ? -image : image)) return false;
      }
    }
    const Indices sums(columns.begin(), columns.begin() + Even::SIZE);
    const Indices differences(columns.begin(), columns.begin() + Odd::SIZE);
    return Pack<A, Even>::into(to, matrix, stride, even, sums, transpose) &&
           Pack<A, Odd>::into(to, matrix, stride, odd, differences, transpose);
  }
};

Indices range(int64_t first, int64_t last) {
  Indices result;
  for (int64_t i = first; i < last; ++i) result.push_back(i);
  return result;
}

// Rows as in `FourierLine`: cosines at k, sines at N - k.
template <typename A, int N>
bool pack(std::vector<A>& to, const std::vector<A>& matrix, bool transpose) {
  for (int64_t k = 0; k < N; ++k) {
    for (int64_t n = 1; n < N; ++n) {
      const A entry = matrix[size_t(k * N + n)], image = matrix[size_t(k * N + N - n)];
      if (entry != (k > N / 2 ? -image : image)) return false;
    }
    if (k > N / 2 && matrix[size_t(k * N)] != 0) return false;
  }
  Indices sines = range(N / 2 + 1, N);
  const Indices backwards(sines.rbegin(), sines.rend());
  return Pack<A, typename FourierCosineTree<N>::type>::into(to, matrix, N, range(0, N / 2 + 1), range(0, N / 2 + 1),
                                                            transpose) &&
         Pack<A, typename FourierSineTree<N>::type>::into(to, matrix, N, backwards, range(1, (N + 1) / 2), transpose);
}

template <typename A>
bool pack(std::vector<A>& to, const std::vector<A>& matrix, int64_t length, bool transpose) {
  switch (length) {
#define MLIP_PACK(N) \
  case N:            \
    return pack<A, N>(to, matrix, transpose);
    MLIP_LENGTHS(MLIP_PACK)
#undef MLIP_PACK
    default:
      return false;
  }
}

}  // namespace

template <typename A>
FourierLine<A>::FourierLine(const Matrix<A>& cosine, const Matrix<A>& sine) : length(cosine.columns) {
  std::vector<A> matrix(size_t(length * length));
  for (int64_t k = 0; k < length; ++k) {
    const bool is_cosine = k <= length / 2;
    const Matrix<A>& from = is_cosine ? cosine : sine;
    const A* row = from.data + (is_cosine ? k : length - k) * from.stride_row;
    for (int64_t n = 0; n < length; ++n) matrix[size_t(k * length + n)] = row[n * from.stride_column];
  }
  if (has_short_lines<A>() && pack(plain, matrix, length, false) && pack(flipped, matrix, length, true)) {
    tree = plain.data(), tree_transposed = flipped.data();
    return;
  }
  forward = Line<A>({matrix.data(), length, length, length, 1});
  transposed = Line<A>({matrix.data(), length, length, 1, length});
}

template class FourierLine<float>;
template class FourierLine<double>;

}  // namespace mlip::cpu
