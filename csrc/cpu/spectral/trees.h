// The symmetries of the matrices for short axes, as types: what is known at compile time needs no lists and no memory
// between its steps.
//
// A tree stands for a square matrix of its size. Dense has no symmetry. The rows of a Fold are even and odd, in turn,
// under n -> SIZE - 1 - n: the even rows are the tree Even of sums, the odd rows the tree Odd of differences. The
// transposed matrix has the same tree. Coefficients are those of Even, then of Odd; row by row where it is dense.
#pragma once

namespace mlip::cpu {

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

// The lengths that are compiled, sides of the grids that people use: MLIP_LENGTHS(macro) is macro(7) macro(8) ...
#define MLIP_LENGTHS(MACRO) MACRO(7) MACRO(8) MACRO(14) MACRO(16) MACRO(24) MACRO(27) MACRO(32)

}  // namespace mlip::cpu
