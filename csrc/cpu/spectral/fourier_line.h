// The real FFT along one axis as N numbers instead of N / 2 + 1 complex ones of which some are 0:
//
//   cosines   c_k = sum_n cos(2 pi k n / N) x_n at k     for k = 0 .. N / 2
//   sines     s_k = -sum_n sin(2 pi k n / N) x_n at N - k for 0 < k < N / 2
//
// both scaled alike. Applied along both axes of a grid this is a real map, the same for every plane, and twice as cheap
// as complex columns; two numbers of opposite columns and rows make a complex coefficient (cpu/spectral/spectrum.h).
// The lengths of common grids run in registers by the tree of their symmetries, all others as a `Line`.
#pragma once
#include <cstdint>
#include <cstddef>
#include <vector>

#include "cpu/spectral/lines.h"
#include "cpu/spectral/trees.h"

namespace mlip::cpu {

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

template <typename A>
class FourierLine {
 public:
  FourierLine() = default;
  // From row k and column n of the matrices `cosine` and `sine`, of at least N / 2 + 1 rows and N columns.
  FourierLine(const Matrix<A>& cosine, const Matrix<A>& sine);

  int64_t length = 0;
  const A* tree = nullptr;  // coefficients of the cosine tree, then of the sine tree; null: not compiled
  const A* tree_transposed = nullptr;
  Line<A> forward, transposed;  // where there is no tree

  int64_t scratch() const {
    if (tree) return length * BLOCK_CHANNELS;
    return forward.scratch() > transposed.scratch() ? forward.scratch() : transposed.scratch();
  }

 private:
  std::vector<A> plain, flipped;
};

}  // namespace mlip::cpu
