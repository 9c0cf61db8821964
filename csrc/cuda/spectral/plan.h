// Which stages make a map of the spectral family: plain host code, no torch headers.
//
// On a grid, tiles have a row of points for each row of the grid; the pitch is odd, so that points below each other
// lie in different banks. The token axis is a grid of one column. A Fourier row has K real parts, then K imaginary
// ones.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

constexpr int MOST_TILES_IN_PLACE = 4;  // of rows: as many as a warp's registers hold
constexpr int MOST_STEPS_IN_PLACE = 8;  // longer sums are made in parts
constexpr int MOST_FRAGMENTS = 32;      // of a matrix in shared memory
constexpr int MOST_IN_TABLE = 4096;     // factors or bands in shared memory

// Real and imaginary parts: neither, rows, columns, or both (a complex matrix).
inline Axis axis_of(const Matrix& matrix, bool rows_paired, bool columns_paired, float sign = 0) {
  Axis axis{};
  axis.matrix = matrix;
  axis.sign = sign;
  const int parts = sign != 0 ? 2 : 1;
  axis.rows = parts * matrix.rows, axis.columns = parts * matrix.columns;
  axis.row_limit = rows_paired ? axis.rows / 2 : axis.rows;
  axis.column_limit = columns_paired ? axis.columns / 2 : axis.columns;
  axis.row_tile = rows_paired ? 8 : 16, axis.row_pair = rows_paired ? axis.row_limit : 8;
  axis.column_tile = columns_paired ? 4 : 8, axis.column_pair = columns_paired ? axis.column_limit : 4;
  axis.m_tiles = int(ceil_div(axis.row_limit, axis.row_tile));
  axis.k_steps = int(ceil_div(axis.column_limit, axis.column_tile));
  axis.fragments = -1;
  return axis;
}

inline bool in_place(const Axis& axis) {
  return axis.m_tiles <= MOST_TILES_IN_PLACE && axis.k_steps <= MOST_STEPS_IN_PLACE;
}

// Adds stages to a map, one after another.
class Plan {
 public:
  // Tokens on a grid of height x width points; `along_h` is null on the token axis.
  Plan(Map& map, const Matrix& along_h, const Matrix& along_w, bool fourier)
      : map_(map), fourier_(fourier), h_(along_h), w_(along_w) {}

  // A grid of `rows` x `columns` tokens is read, or a spectrum in two parts.
  void read(int rows, int columns, bool two_parts) {
    const bool grid = h_.data != nullptr;
    const int widest = w_.rows > w_.columns ? w_.rows : w_.columns;
    pitch_ = grid ? widest | 1 : 1;
    map_.height = grid ? rows : columns;
    map_.row = grid ? columns : 1;
    map_.pitch = pitch_;
    map_.imaginary = two_parts ? columns : 0;
    reserve(grid ? pitch_ * (rows > h_.rows ? (rows > h_.columns ? rows : h_.columns)
                                            : (h_.rows > h_.columns ? h_.rows : h_.columns))
                 : widest);
    tile_ = map_.first_tile = 0;
    use(0);
  }

  // From tokens of `height` rows to coefficients, of which `what` becomes.
  void forward(const Matrix& h, const Matrix& w, int height, To what) {
    if (!h.data) return column(axis_of(w, fourier_, false), {0, 1, 0}, w.rows, what);
    row(axis_of(w, fourier_, false), height, To::tile, {});
    const int columns = fourier_ ? w.rows / 2 : w.rows;
    if (fourier_) {
      column(axis_of(h, true, true, sign_), {1, columns, 0}, columns, what);
    } else {
      column(axis_of(h, false, false), {1, columns, 8 * columns}, columns, what);
    }
  }

  // From coefficients to tokens.
  void back(const Matrix& h, const Matrix& w, To what) {
    if (!h.data) return column(axis_of(w, false, fourier_), {0, 1, 8}, w.rows, what);
    if (fourier_) {
      column(axis_of(h, true, true, sign_), {}, w.columns / 2, To::tile);
    } else {
      column(axis_of(h, false, false), {}, w.columns, To::tile);
    }
    row(axis_of(w, false, fourier_), h.rows, what, {w.rows, 1, 8});
  }

  void conjugate(bool adjoint) { sign_ = adjoint ? -1.0f : 1.0f; }
  void hold() { held_ = tile_; }  // what was made so far stays where it is
  int held() const { return held_; }
  int start_again() {
    tile_ = free_tile();
    use(tile_);
    return tile_;
  }

 private:
  void row(const Axis& axis, int height, To what, const Lines& label) {
    add(axis, {pitch_, 1, axis.column_pair}, {pitch_, 1, axis.row_pair}, label, height, what);
  }

  // On the token axis there is one column.
  void column(const Axis& axis, Lines label, int lines, To what) {
    const bool grid = h_.data != nullptr, complex = axis.sign != 0;
    if (!grid) {
      label.pair = axis.row_tile == 8 ? 0 : 8;
      return add(axis, {0, 1, axis.column_pair}, {0, 1, axis.row_pair}, label, 1, what);
    }
    const int in = complex ? lines : axis.column_pair * pitch_, out = complex ? lines : axis.row_pair * pitch_;
    add(axis, {1, pitch_, in}, {1, pitch_, out}, label, lines, what);
  }

  void add(const Axis& axis, const Lines& in, const Lines& out, const Lines& label, int lines, To what) {
    Stage& stage = map_.stage[map_.stages++];
    stage.axis = axis;
    stage.in = in, stage.out = out, stage.label = label;
    stage.lines = lines;
    stage.what = what;
    stage.from = stage.to = tile_;
    const int fragments = axis.m_tiles * axis.k_steps;
    if (fragments <= MOST_FRAGMENTS) {
      stage.axis.fragments = map_.fragments;
      map_.fragments += fragments;
    }
    const bool kept = what != To::tokens && what != To::spectrum && what != To::energies && what != To::products;
    if (what == To::products) stage.to = held_;
    if (kept && !in_place(axis)) stage.to = free_tile();
    if (kept) tile_ = stage.to;
    use(stage.to);
  }

  int free_tile() const {
    int tile = 0;
    while (tile == tile_ || tile == held_) ++tile;
    return tile;
  }

  void use(int tile) { map_.tiles = map_.tiles > tile ? map_.tiles : tile + 1; }
  void reserve(int points) { map_.tile_points = map_.tile_points > points ? map_.tile_points : points; }

  Map& map_;
  bool fourier_;
  Matrix h_, w_;
  float sign_ = 1;
  int pitch_ = 1, tile_ = 0, held_ = -1;
};

inline int table_of(const Map& map) { return map.coefficients <= MOST_IN_TABLE ? map.coefficients : 0; }

// The second half of the stages uses the matrices of the first half.
inline void share_fragments(Map& map) {
  const int half = map.stages / 2;
  for (int s = 0; s < half; ++s) map.stage[half + s].axis.fragments = map.stage[s].axis.fragments;
  map.fragments /= 2;
  map.own_fragments = half;
}

}  // namespace mlip::cuda::spectral
