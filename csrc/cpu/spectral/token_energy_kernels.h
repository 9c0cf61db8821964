// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/token_energy.h.
#include "cpu/spectral/spectrum_kernels.h"

// A thread's memory behind that of the stages.
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
    for (int64_t k = 0; k < s.in_a_row(); ++k) {
      for (int64_t h = 0; h < s.height; ++h) {
        factors[k * s.height + h] = s.multiplicity(k) * p.kept[h * s.in_a_row() + k];
      }
    }
  }
};

// The spectrum in the tile, before it goes along columns, becomes that of P x.
// `next`: tokens that will be read next, or null.
template <typename T, typename A>
static void keep(const Stages<A>& stages, const A* factors, const T* next, int64_t stride) {
  for (int64_t k = 0; k < stages.s.in_a_row(); ++k) {
    if (next) stages.prefetch_share(k, next, stride);
    stages.scale_column(k, stages.column_forward(k), factors);
    stages.column_back(k);
  }
}

template <typename T, typename A = Accumulate<T>>
static void sums(const TokenEnergy<T>& p, int64_t begin, int64_t end, A* scratch) {
  const Spectrum<A>& s = p.spectrum;
  const TokenEnergyMemory<T> memory(p, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.segments(), segment = task % p.segments();
    const int64_t behind = (segment + 1) * p.SEGMENT, last = behind < p.blocks() ? behind : p.blocks();
    std::memset(memory.squares, 0, size_t(s.points() * LANES<A>) * sizeof(A));
    for (int64_t block = segment * p.SEGMENT; block < last; ++block) {
      for_pieces<A>(p.channels, block, [&](const Piece& piece) {
        const Stages<A> stages(s, piece, scratch);
        const T* x = p.x + b * p.stride_batch + p.prefix * p.stride_token + piece.channel;
        stages.rows_forward(x, p.stride_token);
        keep(stages, memory.factors, p.start(b * p.blocks() + (block + 1 < last ? block + 1 : block)), p.stride_token);
        for (int64_t h = 0; h < s.height; ++h) {
          stages.template row_back<A>(h, memory.row, stages.point);
          for (int64_t w = 0; w < s.width; ++w) {
            A* to = memory.squares + (h * s.width + w) * LANES<A>;
            Vector<A> sum = load(to);
            for (int64_t d = 0; d < stages.point; d += LANES<A>) {
              const Vector<A> high = load(memory.row + w * stages.point + d);
              sum += high * high;
            }
            store(to, sum);
          }
        }
      });
    }
    A* partial = p.partial + task * s.points();
    for (int64_t n = 0; n < s.points(); ++n) partial[n] = sum<A>(load(memory.squares + n * LANES<A>));
  }
}

template <typename T, typename A = Accumulate<T>>
static void finish(const TokenEnergy<T>& p, int64_t begin, int64_t end) {
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
static void backward(const TokenEnergy<T>& p, int64_t begin, int64_t end, A* scratch) {
  const Spectrum<A>& s = p.spectrum;
  const TokenEnergyMemory<T> memory(p, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), block = task % p.blocks();
    const A* grad = p.grad + b * p.tokens() + p.prefix;
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const Stages<A> stages(s, piece, scratch);
      const T* x = p.x + b * p.stride_batch + p.prefix * p.stride_token + piece.channel;
      stages.rows_forward(x, p.stride_token);
      keep<T>(stages, memory.factors, nullptr, 0);
      for (int64_t h = 0; h < s.height; ++h) {
        stages.template row_back<A>(h, memory.row, stages.point);
        for (int64_t w = 0; w < s.width; ++w) {
          const Vector<A> twice = broadcast(2 * grad[h * s.width + w]);
          A* at = memory.row + w * stages.point;
          for (int64_t d = 0; d < stages.point; d += LANES<A>) store(at + d, twice * load(at + d));
        }
        stages.template row_forward<A>(h, memory.row, stages.point);
      }
      keep(stages, memory.factors, p.start(task + 1 < end ? task + 1 : task), p.stride_token);
      T* grad_x = p.grad_x + b * p.tokens() * p.channels + piece.channel;
      stages.zero_prefix(grad_x, p.channels, p.prefix);
      stages.rows_back(grad_x + p.prefix * p.channels, p.channels, p.streamed(p.grad_x));
    });
  }
}
