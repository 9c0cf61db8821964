// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/band_energy.h.
#include "cpu/spectral/spectrum_kernels.h"

// energies [bands, channels] += the squares of column k, each to its band.
template <typename A>
static void add_squares(const Stages<A>& stages, int64_t k, const Column<A>& c, const int32_t* bands, int64_t count,
                        A* energies) {
  const Vector<A> images = broadcast(stages.s.multiplicity(k));
  for (int64_t h = 0; h < stages.s.height; ++h) {
    const int64_t band = bands[h * stages.s.in_a_row() + k];
    if (band < 0 || band >= count) continue;
    A* sum = energies + band * stages.point;
    for (int64_t d = 0; d < stages.point; d += LANES<A>) {
      const Vector<A> real = load(c.real + h * stages.point + d);
      Vector<A> square = real * real;
      if (stages.s.fourier) {
        const Vector<A> imaginary = load(c.imaginary + h * stages.point + d);
        square += imaginary * imaginary;
      }
      store(sum + d, load(sum + d) + images * square);
    }
  }
}

// Column k times its share [bands, channels] and its mirror images.
template <typename A>
static void take_shares(const Stages<A>& stages, int64_t k, const Column<A>& c, const int32_t* bands, int64_t count,
                        const A* shares) {
  const Vector<A> images = broadcast(stages.s.multiplicity(k));
  for (int64_t h = 0; h < stages.s.height; ++h) {
    const int64_t band = bands[h * stages.s.in_a_row() + k];
    const bool counts = band >= 0 && band < count;
    for (int64_t d = 0; d < stages.point; d += LANES<A>) {
      const Vector<A> share = counts ? images * load(shares + band * stages.point + d) : Vector<A>{};
      A *real = c.real + h * stages.point + d, *imaginary = c.imaginary + h * stages.point + d;
      store(real, share * load(real));
      if (stages.s.fourier) store(imaginary, share * load(imaginary));
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void forward(const BandEnergy<T>& p, int64_t begin, int64_t end, A* scratch) {
  const Spectrum<A>& s = p.spectrum;
  A* energies = scratch + s.scratch();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), block = task % p.blocks();
    const T* next = p.start(task + 1 < end ? task + 1 : task);
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const Stages<A> stages(s, piece, scratch);
      const T* x = p.x + b * p.stride_batch + p.prefix * p.stride_token + piece.channel;
      stages.rows_forward(x, p.stride_token);
      std::memset(energies, 0, size_t(p.count * stages.point) * sizeof(A));
      for (int64_t k = 0; k < s.in_a_row(); ++k) {
        stages.prefetch_share(k, next, p.stride_token);
        add_squares(stages, k, stages.column_forward(k), p.bands, p.count, energies);
      }
      for (int64_t j = 0; j < p.count; ++j) {
        T* to = p.energy + (b * p.count + j) * p.channels + piece.channel;
        stages.narrow(energies + j * stages.point, to);
      }
    });
  }
}

template <typename T, typename A = Accumulate<T>>
static void backward(const BandEnergy<T>& p, int64_t begin, int64_t end, A* scratch) {
  const Spectrum<A>& s = p.spectrum;
  A* shares = scratch + s.scratch();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), block = task % p.blocks();
    const T* next = p.start(task + 1 < end ? task + 1 : task);
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const Stages<A> stages(s, piece, scratch);
      for (int64_t j = 0; j < p.count; ++j) {
        A* share = shares + j * stages.point;
        stages.widen(p.grad + (b * p.count + j) * p.channels + piece.channel, share);
        for (int64_t d = 0; d < stages.point; d += LANES<A>) store(share + d, load(share + d) + load(share + d));
      }
      const T* x = p.x + b * p.stride_batch + p.prefix * p.stride_token + piece.channel;
      stages.rows_forward(x, p.stride_token);
      for (int64_t k = 0; k < s.in_a_row(); ++k) {
        stages.prefetch_share(k, next, p.stride_token);
        take_shares(stages, k, stages.column_forward(k), p.bands, p.count, shares);
        stages.column_back(k);
      }
      T* grad_x = p.grad_x + b * p.tokens() * p.channels + piece.channel;
      stages.zero_prefix(grad_x, p.channels, p.prefix);
      stages.rows_back(grad_x + p.prefix * p.channels, p.channels, p.streamed(p.grad_x));
    });
  }
}
