// Kernels of cpu/spectral/energy.h.
#include "cpu/spectral/energy.h"

#include "cpu/spectral/spectrum.h"

#define MLIP_KERNELS "cpu/spectral/energy.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

// energies [bands, channels] += the squares of column k, each to its band.
template <typename A>
static void add_squares(const BlockTransform<A>& transform, int64_t k, const Column<A>& c, const int32_t* bands,
                        int64_t count, A* energies) {
  const Vector<A> images = broadcast(transform.s.multiplicity(k));
  for (int64_t h = 0; h < transform.s.height; ++h) {
    const int64_t band = bands[h * transform.s.num_bins() + k];
    if (band < 0 || band >= count) continue;
    A* sum = energies + band * transform.point;
    for (int64_t d = 0; d < transform.point; d += LANES<A>) {
      const Vector<A> real = load(c.real + h * transform.point + d);
      Vector<A> square = real * real;
      if (transform.s.fourier) {
        const Vector<A> imaginary = load(c.imaginary + h * transform.point + d);
        square += imaginary * imaginary;
      }
      store(sum + d, load(sum + d) + images * square);
    }
  }
}

// Column k times the factors [bands, channels] of its bands and its mirror images.
template <typename A>
static void scale_by_band(const BlockTransform<A>& transform, int64_t k, const Column<A>& c, const int32_t* bands,
                          int64_t count, const A* factors) {
  const Vector<A> images = broadcast(transform.s.multiplicity(k));
  for (int64_t h = 0; h < transform.s.height; ++h) {
    const int64_t band = bands[h * transform.s.num_bins() + k];
    const bool counts = band >= 0 && band < count;
    for (int64_t d = 0; d < transform.point; d += LANES<A>) {
      const Vector<A> factor = counts ? images * load(factors + band * transform.point + d) : Vector<A>{};
      A *real = c.real + h * transform.point + d, *imaginary = c.imaginary + h * transform.point + d;
      store(real, factor * load(real));
      if (transform.s.fourier) store(imaginary, factor * load(imaginary));
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void band_energy(const BandEnergy<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  const Spectrum<A>& s = p.spectrum;
  A *scratch = memory.as<A>(), *energies = scratch + s.scratch();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), block = task % p.blocks();
    const T* next = p.grid_of_task(task + 1 < end ? task + 1 : task);
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const BlockTransform<A> transform(s, piece, scratch);
      const T* x = p.grid(b, piece.channel);
      transform.rows_forward(x, p.stride_token);
      std::memset(energies, 0, size_t(p.count * transform.point) * sizeof(A));
      for (int64_t k = 0; k < s.num_bins(); ++k) {
        transform.prefetch_next(k, next, p.stride_token);
        add_squares(transform, k, transform.column_forward(k), p.bands, p.count, energies);
      }
      for (int64_t j = 0; j < p.count; ++j) {
        T* to = p.energy + (b * p.count + j) * p.channels + piece.channel;
        transform.narrow(energies + j * transform.point, to);
      }
    });
  }
}

template <typename T, typename A = Accumulate<T>>
static void band_energy_backward(const BandEnergy<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  const Spectrum<A>& s = p.spectrum;
  A *scratch = memory.as<A>(), *factors = scratch + s.scratch();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), block = task % p.blocks();
    const T* next = p.grid_of_task(task + 1 < end ? task + 1 : task);
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const BlockTransform<A> transform(s, piece, scratch);
      for (int64_t j = 0; j < p.count; ++j) {
        A* factor = factors + j * transform.point;
        transform.widen(p.grad + (b * p.count + j) * p.channels + piece.channel, factor);
        for (int64_t d = 0; d < transform.point; d += LANES<A>) store(factor + d, load(factor + d) + load(factor + d));
      }
      const T* x = p.grid(b, piece.channel);
      transform.rows_forward(x, p.stride_token);
      for (int64_t k = 0; k < s.num_bins(); ++k) {
        transform.prefetch_next(k, next, p.stride_token);
        scale_by_band(transform, k, transform.column_forward(k), p.bands, p.count, factors);
        transform.column_back(k);
      }
      T* grad_x = p.grad_x + b * p.tokens() * p.channels + piece.channel;
      transform.zero_prefix(grad_x, p.channels, p.prefix);
      transform.rows_back(grad_x + p.prefix * p.channels, p.channels, p.streamed(p.grad_x));
    });
  }
}

// A thread's memory behind that of the transform.
template <typename T, typename A = Accumulate<T>>
struct TokenEnergyMemory {
  A* row;      // [W, channels of a piece]
  A* squares;  // [H W, LANES]
  A* factors;  // [K, H]: 0 for what is dropped, else how often the coefficient counts

  TokenEnergyMemory(const TokenEnergy<T>& p, A* scratch) {
    const Spectrum<A>& s = p.spectrum;
    row = scratch + s.scratch();
    squares = row + s.width * BLOCK_CHANNELS;
    factors = squares + s.points() * MOST_LANES<A>;
    for (int64_t k = 0; k < s.num_bins(); ++k) {
      for (int64_t h = 0; h < s.height; ++h) {
        factors[k * s.height + h] = s.multiplicity(k) * p.frequency_mask[h * s.num_bins() + k];
      }
    }
  }
};

// The rows in the tile, transformed along W, become those of P x. `next`: tokens that will be read next, or null.
template <typename T, typename A>
static void project(const BlockTransform<A>& transform, const A* factors, const T* next, int64_t stride) {
  for (int64_t k = 0; k < transform.s.num_bins(); ++k) {
    if (next) transform.prefetch_next(k, next, stride);
    transform.scale_column(k, transform.column_forward(k), factors);
    transform.column_back(k);
  }
}

template <typename T, typename A = Accumulate<T>>
static void token_energy_sums(const TokenEnergy<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  A* scratch = memory.as<A>();
  const Spectrum<A>& s = p.spectrum;
  const TokenEnergyMemory<T> of(p, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.segments(), segment = task % p.segments();
    const int64_t behind = (segment + 1) * p.SEGMENT, last = behind < p.blocks() ? behind : p.blocks();
    std::memset(of.squares, 0, size_t(s.points() * LANES<A>) * sizeof(A));
    for (int64_t block = segment * p.SEGMENT; block < last; ++block) {
      for_pieces<A>(p.channels, block, [&](const Piece& piece) {
        const BlockTransform<A> transform(s, piece, scratch);
        const T* x = p.grid(b, piece.channel);
        transform.rows_forward(x, p.stride_token);
        project(transform, of.factors, p.grid_of_task(b * p.blocks() + (block + 1 < last ? block + 1 : block)),
                p.stride_token);
        for (int64_t h = 0; h < s.height; ++h) {
          transform.template row_back<A>(h, of.row, transform.point);
          for (int64_t w = 0; w < s.width; ++w) {
            A* to = of.squares + (h * s.width + w) * LANES<A>;
            Vector<A> sum = load(to);
            for (int64_t d = 0; d < transform.point; d += LANES<A>) {
              const Vector<A> high = load(of.row + w * transform.point + d);
              sum += high * high;
            }
            store(to, sum);
          }
        }
      });
    }
    A* partial = p.partial + task * s.points();
    for (int64_t n = 0; n < s.points(); ++n) partial[n] = sum<A>(load(of.squares + n * LANES<A>));
  }
}

template <typename T, typename A = Accumulate<T>>
static void token_energy_finish(const TokenEnergy<T>& p, int64_t begin, int64_t end) {
  const int64_t points = p.spectrum.points();
  for (int64_t b = begin; b < end; ++b) {
    A* energy = p.energy + b * p.tokens();
    for (int64_t n = 0; n < p.prefix; ++n) *energy++ = 0;
    for (int64_t n = 0; n < points; ++n) {
      energy[n] = 0;
      for (int64_t i = 0; i < p.segments(); ++i) energy[n] += p.partial[(b * p.segments() + i) * points + n];
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void token_energy_backward(const TokenEnergy<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  A* scratch = memory.as<A>();
  const Spectrum<A>& s = p.spectrum;
  const TokenEnergyMemory<T> of(p, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), block = task % p.blocks();
    const A* grad = p.grad + b * p.tokens() + p.prefix;
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const BlockTransform<A> transform(s, piece, scratch);
      const T* x = p.grid(b, piece.channel);
      transform.rows_forward(x, p.stride_token);
      project<T>(transform, of.factors, nullptr, 0);
      for (int64_t h = 0; h < s.height; ++h) {
        transform.template row_back<A>(h, of.row, transform.point);
        for (int64_t w = 0; w < s.width; ++w) {
          const Vector<A> twice = broadcast(2 * grad[h * s.width + w]);
          A* at = of.row + w * transform.point;
          for (int64_t d = 0; d < transform.point; d += LANES<A>) store(at + d, twice * load(at + d));
        }
        transform.template row_forward<A>(h, of.row, transform.point);
      }
      project(transform, of.factors, p.grid_of_task(task + 1 < end ? task + 1 : task), p.stride_token);
      T* grad_x = p.grad_x + b * p.tokens() * p.channels + piece.channel;
      transform.zero_prefix(grad_x, p.channels, p.prefix);
      transform.rows_back(grad_x + p.prefix * p.channels, p.channels, p.streamed(p.grad_x));
    });
  }
}

#else
MLIP_DEFINE_DISPATCH(band_energy, BandEnergy)
MLIP_DEFINE_DISPATCH(band_energy_backward, BandEnergy)
MLIP_DEFINE_DISPATCH(token_energy_sums, TokenEnergy)
MLIP_DEFINE_DISPATCH(token_energy_finish, TokenEnergy)
MLIP_DEFINE_DISPATCH(token_energy_backward, TokenEnergy)
#endif
