// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/filtered.h.
#include "cpu/spectral/spectrum_kernels.h"

// The weight of a piece as [K, H, parts, channels], mirror images counted.
template <typename A>
static void unpack_weight(const Spectrum<A>& s, const A* weight, int64_t channels, const Piece& piece, A* to) {
  const int64_t parts = s.parts(), point = piece.vectors * LANES<A>;
  for (int64_t k = 0; k < s.in_a_row(); ++k) {
    const A count = s.multiplicity(k);
    for (int64_t h = 0; h < s.height; ++h, to += parts * point) {
      const A* from = weight + ((h * s.in_a_row() + k) * channels + piece.channel) * parts;
      if (s.fourier) {
        for (int64_t d = 0; d < piece.count; ++d) to[d] = count * from[2 * d], to[point + d] = count * from[2 * d + 1];
      } else {
        for (int64_t d = 0; d < piece.count; ++d) to[d] = from[d];
      }
    }
  }
}

// The column times its weight [H, parts, channels].
template <typename A>
static void weigh(const Stages<A>& stages, const Column<A>& c, const A* weight) {
  const int64_t point = stages.point;
  if (!stages.s.fourier) {
    for (int64_t h = 0; h < stages.s.height; ++h, weight += point) {
      A* at = c.real + h * point;
      for (int64_t d = 0; d < point; d += LANES<A>) store(at + d, load(at + d) * load(weight + d));
    }
    return;
  }
  for (int64_t h = 0; h < stages.s.height; ++h, weight += 2 * point) {
    A *real = c.real + h * point, *imaginary = c.imaginary + h * point;
    for (int64_t d = 0; d < point; d += LANES<A>) {
      const Vector<A> re = load(real + d), im = load(imaginary + d);
      const Vector<A> weight_re = load(weight + d), weight_im = load(weight + point + d);
      store(real + d, re * weight_re - im * weight_im);
      store(imaginary + d, re * weight_im + im * weight_re);
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void filtered_tasks(const Filtered<T>& p, int64_t begin, int64_t end, A* scratch) {
  const Spectrum<A>& s = p.spectrum;
  A* weight = scratch + s.scratch();
  for_blocks(begin, end, p.batch, [&](int64_t block, int64_t first, int64_t last) {
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const Stages<A> stages(s, piece, scratch);
      unpack_weight(s, p.weight, p.channels, piece, weight);
      for (int64_t b = first; b < last; ++b) {
        const T* x = p.x + b * p.stride_batch + piece.channel;
        T* y = p.y + b * p.tokens() * p.channels + piece.channel;
        for (int64_t n = 0; n < p.prefix; ++n, x += p.stride_token, y += p.channels) {
          std::memcpy(static_cast<void*>(y), x, size_t(piece.count) * sizeof(T));
        }
        stages.rows_forward(x, p.stride_token);
        const T* next = b + 1 < last ? x + p.stride_batch : x;
        for (int64_t k = 0; k < s.in_a_row(); ++k) {
          stages.prefetch_share(k, next, p.stride_token);
          weigh(stages, stages.column_forward(k), weight + k * s.height * s.parts() * stages.point);
          stages.column_back(k);
        }
        stages.rows_back(y, p.channels, p.streamed(p.y));
      }
    });
  });
}
