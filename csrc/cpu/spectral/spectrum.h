// Tokens to their spectrum and back again, in the cache: the common part of filter and energies.
//
// A block of channels of one batch element takes three passes:
//
//   rows         x is read once, widened, and transformed along W into a tile [H, W, channels]
//   columns      one column of the spectrum at a time: transformed along H, used (weighted, squared), transformed back
//   rows back    y is written once
//
// The matrices are orthonormal, so the way back is the transposed matrix. In the Fourier basis the tile holds cosines
// and sines of rows, and real transforms along columns make cosines and sines of both (cc, cs: a cosine along H of a
// cosine or sine along W, ...). Coefficients of rows l and H - l of the spectrum are made of the same four numbers,
//
//   Z[l, k] = (cc - ss) + i (sc + cs)      Z[H - l, k] = (cc + ss) + i (cs - sc)
//
// without sines where l or k is its own mirror image (DC and Nyquist), which is also why an imaginary part does not
// come back from there. The coefficients 0 < k < W / 2 stand for their mirror image too and count twice; that factor is
// part of what the spectrum is multiplied with.
#ifndef MLIP_CPU_SPECTRAL_SPECTRUM_H
#define MLIP_CPU_SPECTRAL_SPECTRUM_H
#include <cstdint>

#include "cpu/spectral/axis_transform.h"
#include "cpu/simd.h"

namespace mlip::cpu {

// The transform of a grid, and its inverse.
template <typename A>
struct Spectrum {
  bool fourier;  // otherwise the cosine basis
  int64_t height, width;
  AxisTransform<A> rows, rows_back, columns, columns_back;  // no columns on the token axis

  int64_t parts() const { return fourier ? 2 : 1; }
  int64_t points() const { return height * width; }
  int64_t num_bins() const { return fourier ? width / 2 + 1 : width; }  // coefficients in a row
  int64_t coefficients() const { return height * num_bins(); }
  A multiplicity(int64_t k) const { return !fourier || k == 0 || 2 * k == width ? A(1) : A(2); }

  // What a thread needs, in elements: for a block, for a column of its spectrum, for padded channels, for an axis.
  int64_t tile() const { return height * (width * BLOCK_CHANNELS + MOST_LANES<A>); }
  int64_t column() const { return parts() * height * BLOCK_CHANNELS; }
  int64_t padded() const {
    const int64_t channels = points() * MOST_LANES<A>, streamed_row = width * BLOCK_CHANNELS;
    return channels > streamed_row ? channels : streamed_row;
  }
  int64_t scratch() const {
    int64_t most = 0;
    for (const AxisTransform<A>* axis : {&rows, &rows_back, &columns, &columns_back}) {
      most = axis->scratch() > most ? axis->scratch() : most;
    }
    return tile() + column() + padded() + most;
  }
  // A number per part of each coefficient of a block.
  int64_t factors() const { return parts() * coefficients() * BLOCK_CHANNELS; }
};

// What the problems of the family have in common. Tokens have unit stride over channels.
template <typename T>
struct SpectralTokens {
  Spectrum<Accumulate<T>> spectrum;
  int64_t batch, channels, prefix;
  const T* x;                          // [B, prefix + H W, D]
  int64_t stride_batch, stride_token;  // of x, in elements

  int64_t tokens() const { return prefix + spectrum.points(); }
  int64_t blocks() const { return (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS; }  // of channels
  int64_t tasks() const { return batch * blocks(); }
  // Whether the output y [B, prefix + H W, D] is to go past the caches.
  bool streamed(const T* y) const { return can_stream(y, batch * tokens(), channels); }
  // x at the first point of the grid, behind the prefix.
  const T* grid(int64_t b, int64_t channel) const { return x + b * stride_batch + prefix * stride_token + channel; }
  const T* grid_of_task(int64_t task) const { return grid(task / blocks(), task % blocks() * BLOCK_CHANNELS); }
};

}  // namespace mlip::cpu
#endif

// What kernels see: included again, once per instruction set (cpu/simd.h).
#ifdef MLIP_VECTOR_BYTES
#include "cpu/spectral/axis_transform.h"

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

// One piece on its way through the passes; memory as `Spectrum::scratch` says.
template <typename A>
struct BlockTransform {
  const Spectrum<A>& s;
  const Piece piece;
  const int64_t point, row;  // from one point in `tile` to the next, to the next row
  A *tile, *column, *padded, *axis;

  BlockTransform(const Spectrum<A>& spectrum, const Piece& its_piece, A* scratch)
      : s(spectrum),
        piece(its_piece),
        point(piece.vectors * LANES<A>),
        row(s.width * point + LANES<A>),  // not a power of 2: points of a column would share few places in the cache
        tile(scratch),
        column(tile + s.tile()),
        padded(column + s.column()),
        axis(padded + s.padded()) {}

  // Row h of the grid, whole vectors of channels, into row h of the tile.
  template <typename T>
  void row_forward(int64_t h, const T* x, int64_t stride) const {
    transform<T, A, A>(s.rows, {x, stride}, {tile + h * row, point}, piece.vectors, axis);
  }
  template <typename T>
  void row_back(int64_t h, T* y, int64_t stride) const {
    transform<A, T, A>(s.rows_back, {tile + h * row, point}, {y, stride}, piece.vectors, axis);
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
    plane_forward(k, real);
    if (!s.fourier) return {real, imaginary};
    const int64_t pairs = s.columns.outputs ? (s.height - 1) / 2 : 0;
    if (has_sine(k)) {
      plane_forward(s.width - k, imaginary);
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
    const int64_t pairs = s.fourier && s.columns.outputs ? (s.height - 1) / 2 : 0;
    for (int64_t l = 1; l <= pairs; ++l) {
      A *re = real + l * point, *im = imaginary + l * point;
      A *re_image = real + (s.height - l) * point, *im_image = imaginary + (s.height - l) * point;
      for (int64_t d = 0; d < point; d += LANES<A>) {
        const Vector<A> a = load(re + d), b = load(re_image + d), c = load(im + d), e = load(im_image + d);
        store(re + d, a + b), store(re_image + d, c - e);
        store(im + d, c + e), store(im_image + d, b - a);
      }
    }
    plane_back(k, real);
    if (s.fourier && has_sine(k)) plane_back(s.width - k, imaginary);
  }

  // Asks for a part of the tokens that will be read next, while column k is computed: their cache lines lie too far
  // apart for the hardware to foresee.
  template <typename T>
  void prefetch_next(int64_t k, const T* next, int64_t stride) const {
    const int64_t first = k * s.points() / s.num_bins(), behind = (k + 1) * s.points() / s.num_bins();
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

  // Column w of the tile to H points that lie together, and back.
  void plane_forward(int64_t w, A* to) const {
    const A* from = tile + w * point;
    if (!s.columns.outputs) {
      for (int64_t h = 0; h < s.height; ++h) std::memcpy(to + h * point, from + h * row, size_t(point) * sizeof(A));
    } else {
      transform<A, A, A>(s.columns, {from, row}, {to, point}, piece.vectors, axis);
    }
  }
  void plane_back(int64_t w, const A* from) const {
    A* to = tile + w * point;
    if (!s.columns.outputs) {
      for (int64_t h = 0; h < s.height; ++h) std::memcpy(to + h * row, from + h * point, size_t(point) * sizeof(A));
    } else {
      transform<A, A, A>(s.columns_back, {from, point}, {to, row}, piece.vectors, axis);
    }
  }
};

#endif  // MLIP_VECTOR_BYTES
