// The stages of cpu/spectral/spectrum.h. Compiled once per instruction set, in every file that includes it.
#include "cpu/spectral/lines_kernels.h"

// Channels that are computed together: the whole vectors of a block, or what is left behind them in one padded vector.
struct Piece {
  int64_t channel, count, vectors;
};

// Calls use(piece) for the one or two pieces of a block.
template <typename A, typename Use>
static void for_pieces(int64_t channels, int64_t block, const Use& use) {
  const int64_t first = block * Spectrum<A>::BLOCK, behind = channels - first;
  const int64_t count = behind < Spectrum<A>::BLOCK ? behind : Spectrum<A>::BLOCK, rest = count % LANES<A>;
  if (count > rest) use(Piece{first, count - rest, count / LANES<A>});
  if (rest) use(Piece{first + count - rest, rest, 1});
}

// Calls use(block, first, last) for the batch elements [first, last) of each block that the tasks [begin, end) touch;
// task = block * batch + element.
template <typename Use>
static void for_blocks(int64_t begin, int64_t end, int64_t batch, const Use& use) {
  while (begin < end) {
    const int64_t block = begin / batch, behind = (block + 1) * batch < end ? (block + 1) * batch : end;
    use(block, begin - block * batch, behind - block * batch);
    begin = behind;
  }
}

// A column of the spectrum: H coefficients, `stride` apart. There are imaginary parts in the Fourier basis only.
template <typename A>
struct Column {
  A *real, *imaginary;
  int64_t stride;
};

// One piece on its way through the stages; memory as `Spectrum::scratch` says.
template <typename A>
struct Stages {
  const Spectrum<A>& s;
  const Piece piece;
  const int64_t point, imaginary,
      row;  // from one coefficient in `tile` to the next, to its imaginary part, to the next row
  A *tile, *column, *padded, *line;

  Stages(const Spectrum<A>& spectrum, const Piece& its_piece, A* scratch)
      : s(spectrum),
        piece(its_piece),
        point(piece.vectors * LANES<A>),
        imaginary(s.in_a_row() * point),
        row(s.parts() * imaginary),
        tile(scratch),
        column(tile + s.tile()),
        padded(column + s.column()),
        line(padded + s.padded()) {}

  // Row h of the grid, whole vectors of channels, into row h of the tile.
  template <typename T>
  void row_forward(int64_t h, const T* x, int64_t stride) const {
    transform<T, A, A>(s.rows, {x, stride}, {tile + h * row, point}, piece.vectors, line);
  }
  template <typename T>
  void row_back(int64_t h, T* y, int64_t stride) const {
    transform<A, T, A>(s.rows_back, {tile + h * row, point}, {y, stride}, piece.vectors, line);
  }

  // All rows; x and y [H W, D] at the first channel of the piece.
  template <typename T>
  void rows_forward(const T* x, int64_t stride) const {
    if (piece.count < point) {
      for (int64_t n = 0; n < s.points(); ++n) store(padded + n * point, load(x + n * stride, piece.count));
      for (int64_t h = 0; h < s.height; ++h) row_forward<A>(h, padded + h * s.width * point, point);
    } else {
      for (int64_t h = 0; h < s.height; ++h) row_forward<T>(h, x + h * s.width * stride, stride);
    }
  }
  template <typename T>
  void rows_back(T* y, int64_t stride) const {
    if (piece.count < point) {
      for (int64_t h = 0; h < s.height; ++h) row_back<A>(h, padded + h * s.width * point, point);
      for (int64_t n = 0; n < s.points(); ++n) store(y + n * stride, load(padded + n * point), piece.count);
    } else {
      for (int64_t h = 0; h < s.height; ++h) row_back<T>(h, y + h * s.width * stride, stride);
    }
  }

  // Column k, when all rows are in the tile, and the way back of what has become of it. Between the two there is
  // one column at a time.
  Column<A> column_forward(int64_t k) const {
    A* in_tile = tile + k * point;
    if (s.columns.outputs == 0) return {in_tile, in_tile + imaginary, row};
    transform<A, A, A>(s.columns, {in_tile, row, in_tile + imaginary, s.height}, {column, point}, piece.vectors, line);
    return {column, column + s.height * point, point};
  }
  void column_back(int64_t k) const {
    if (s.columns.outputs == 0) return;
    A* in_tile = tile + k * point;
    transform<A, A, A>(s.columns_back, {column, point}, {in_tile, row, in_tile + imaginary, s.height}, piece.vectors,
                       line);
  }

  // One point of the piece, [channels], widened and padded with 0, or narrowed.
  template <typename T>
  void widen(const T* from, A* to) const {
    if (piece.count < point) return store(to, load(from, piece.count));
    for (int64_t d = 0; d < point; d += LANES<A>) store(to + d, load(from + d));
  }
  template <typename T>
  void narrow(const A* from, T* to) const {
    if (piece.count < point) return store(to, load(from), piece.count);
    for (int64_t d = 0; d < point; d += LANES<A>) store(to + d, load(from + d));
  }
  template <typename T>
  void zero_prefix(T* y, int64_t stride, int64_t prefix) const {
    for (int64_t n = 0; n < prefix; ++n) {
      std::memset(static_cast<void*>(y + n * stride), 0, size_t(piece.count) * sizeof(T));
    }
  }

  // The spectrum times a number per coefficient, [K, H].
  void scale_column(int64_t k, const Column<A>& c, const A* factors) const {
    for (int64_t h = 0; h < s.height; ++h) {
      const Vector<A> factor = broadcast(factors[k * s.height + h]);
      for (int64_t part = 0; part < s.parts(); ++part) {
        A* at = (part ? c.imaginary : c.real) + h * c.stride;
        for (int64_t d = 0; d < point; d += LANES<A>) store(at + d, factor * load(at + d));
      }
    }
  }
};
