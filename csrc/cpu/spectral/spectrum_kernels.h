// The stages of cpu/spectral/spectrum.h. Compiled once per instruction set, in every file that includes it.
#include "cpu/spectral/lines_kernels.h"
//
#include "cpu/spectral/fourier_line_kernels.h"

// Channels that are computed together: the whole vectors of a block, or what is left behind them in one padded vector.
struct Piece {
  int64_t channel, count, vectors;
};

// Calls use(piece) for the one or two pieces of a block.
template <typename A, typename Use>
static void for_pieces(int64_t channels, int64_t block, const Use& use) {
  const int64_t first = block * BLOCK_CHANNELS, behind = channels - first;
  const int64_t count = behind < BLOCK_CHANNELS ? behind : BLOCK_CHANNELS, rest = count % LANES<A>;
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

// A column of the spectrum: H coefficients, imaginary parts in the Fourier basis only.
template <typename A>
struct Column {
  A *real, *imaginary;
};

// One piece on its way through the stages; memory as `Spectrum::scratch` says.
template <typename A>
struct Stages {
  const Spectrum<A>& s;
  const Piece piece;
  const int64_t point, row;  // from one point in `tile` to the next, to the next row
  A *tile, *column, *padded, *line;

  Stages(const Spectrum<A>& spectrum, const Piece& its_piece, A* scratch)
      : s(spectrum),
        piece(its_piece),
        point(piece.vectors * LANES<A>),
        row(s.width * point + LANES<A>),  // not a power of 2: points of a column would share few places in the cache
        tile(scratch),
        column(tile + s.tile()),
        padded(column + s.column()),
        line(padded + s.padded()) {}

  // Row h of the grid, whole vectors of channels, into row h of the tile.
  template <typename T>
  void row_forward(int64_t h, const T* x, int64_t stride) const {
    if (s.fourier) return fourier<false>(s.fourier_rows, x, stride, tile + h * row, point, piece.vectors, line);
    transform<T, A, A>(s.rows, {x, stride}, {tile + h * row, point}, piece.vectors, line);
  }
  template <typename T>
  void row_back(int64_t h, T* y, int64_t stride) const {
    const A* from = tile + h * row;
    if (s.fourier) return fourier<true>(s.fourier_rows, from, point, y, stride, piece.vectors, line);
    transform<A, T, A>(s.rows_back, {from, point}, {y, stride}, piece.vectors, line);
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
  void rows_back(T* y, int64_t stride, bool streamed) const {
    if (piece.count < point) {
      for (int64_t h = 0; h < s.height; ++h) row_back<A>(h, padded + h * s.width * point, point);
      for (int64_t n = 0; n < s.points(); ++n) store(y + n * stride, load(padded + n * point), piece.count);
    } else if (streamed && point * int64_t(sizeof(T)) % 64 == 0) {
      for (int64_t h = 0; h < s.height; ++h) {
        row_back<A>(h, padded, point);
        for (int64_t w = 0; w < s.width; ++w) {
          stream_channels(y + (h * s.width + w) * stride, padded + w * point, point);
        }
      }
      fence();
    } else {
      prefetch_output(y, stride);
      for (int64_t h = 0; h < s.height; ++h) {
        if (h + 1 < s.height) prefetch_output(y + (h + 1) * s.width * stride, stride);
        row_back<T>(h, y + h * s.width * stride, stride);
      }
    }
  }

  // Column k of the spectrum, when all rows are in the tile, and the way back of what has become of it. Between the
  // two there is one column at a time.
  Column<A> column_forward(int64_t k) const {
    A *real = column, *imaginary = column + s.height * point;
    along_column(k, real);
    if (!s.fourier) return {real, imaginary};
    const int64_t pairs = s.along_columns ? (s.height - 1) / 2 : 0;
    if (has_sine(k)) {
      along_column(s.width - k, imaginary);
      for (int64_t l = 1; l <= pairs; ++l) {
        A *re = real + l * point, *im = imaginary + l * point;
        A *re_image = real + (s.height - l) * point, *im_image = imaginary + (s.height - l) * point;
        for (int64_t d = 0; d < point; d += LANES<A>) {
          const Vector<A> cc = load(re + d), sc = load(re_image + d), cs = load(im + d), ss = load(im_image + d);
          store(re + d, cc - ss), store(re_image + d, cc + ss);
          store(im + d, cs + sc), store(im_image + d, cs - sc);
        }
      }
      return {real, imaginary};
    }
    std::memset(imaginary, 0, size_t(s.height * point) * sizeof(A));
    for (int64_t l = 1; l <= pairs; ++l) {
      A *re_image = real + (s.height - l) * point, *im_image = imaginary + (s.height - l) * point;
      for (int64_t d = 0; d < point; d += LANES<A>) {
        const Vector<A> cc = load(real + l * point + d), sc = load(re_image + d);
        store(re_image + d, cc), store(imaginary + l * point + d, sc), store(im_image + d, -sc);
      }
    }
    return {real, imaginary};
  }
  void column_back(int64_t k) const {
    A *real = column, *imaginary = column + s.height * point;
    const int64_t pairs = s.fourier && s.along_columns ? (s.height - 1) / 2 : 0;
    for (int64_t l = 1; l <= pairs; ++l) {
      A *re = real + l * point, *im = imaginary + l * point;
      A *re_image = real + (s.height - l) * point, *im_image = imaginary + (s.height - l) * point;
      for (int64_t d = 0; d < point; d += LANES<A>) {
        const Vector<A> a = load(re + d), b = load(re_image + d), c = load(im + d), e = load(im_image + d);
        store(re + d, a + b), store(re_image + d, c - e);
        store(im + d, c + e), store(im_image + d, b - a);
      }
    }
    back_along_column(k, real);
    if (s.fourier && has_sine(k)) back_along_column(s.width - k, imaginary);
  }

  // Asks for a share of the tokens that will be read next, while column k is computed: their lines lie too far apart
  // for the hardware to foresee.
  template <typename T>
  void prefetch_share(int64_t k, const T* next, int64_t stride) const {
    const int64_t first = k * s.points() / s.in_a_row(), behind = (k + 1) * s.points() / s.in_a_row();
    prefetch(next + first * stride, stride, behind - first, piece.count);
  }
  // Asks for a row of the output, which will be written.
  template <typename T>
  void prefetch_output(T* y, int64_t stride) const {
    for (int64_t w = 0; w < s.width; ++w) {
      char* at = reinterpret_cast<char*>(y + w * stride);
      for (int64_t i = 0; i < piece.count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(at + i, 1, 2);
    }
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
        A* at = (part ? c.imaginary : c.real) + h * point;
        for (int64_t d = 0; d < point; d += LANES<A>) store(at + d, factor * load(at + d));
      }
    }
  }

 private:
  bool has_sine(int64_t k) const { return k != 0 && 2 * k != s.width; }

  // Plane w of the tile to H points that lie together, and back.
  void along_column(int64_t w, A* to) const {
    const A* from = tile + w * point;
    if (!s.along_columns) {
      for (int64_t h = 0; h < s.height; ++h) std::memcpy(to + h * point, from + h * row, size_t(point) * sizeof(A));
    } else if (s.fourier) {
      fourier<false>(s.fourier_columns, from, row, to, point, piece.vectors, line);
    } else {
      transform<A, A, A>(s.columns, {from, row}, {to, point}, piece.vectors, line);
    }
  }
  void back_along_column(int64_t w, const A* from) const {
    A* to = tile + w * point;
    if (!s.along_columns) {
      for (int64_t h = 0; h < s.height; ++h) std::memcpy(to + h * row, from + h * point, size_t(point) * sizeof(A));
    } else if (s.fourier) {
      fourier<true>(s.fourier_columns, from, point, to, row, piece.vectors, line);
    } else {
      transform<A, A, A>(s.columns_back, {from, point}, {to, row}, piece.vectors, line);
    }
  }
};
