// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/filtered_backward_weight.h.
#include "cpu/spectral/spectrum_kernels.h"

// sums [H, parts, channels] += conj(x) g along a column.
template <typename A>
static void add_products(const Stages<A>& stages, const Column<A>& g, const Column<A>& x, A* sums) {
  const int64_t point = stages.point;
  if (!stages.s.fourier) {
    for (int64_t h = 0; h < stages.s.height; ++h, sums += point) {
      const A *g_at = g.real + h * point, *x_at = x.real + h * point;
      for (int64_t d = 0; d < point; d += LANES<A>) store(sums + d, load(sums + d) + load(g_at + d) * load(x_at + d));
    }
    return;
  }
  for (int64_t h = 0; h < stages.s.height; ++h, sums += 2 * point) {
    const A *g_real = g.real + h * point, *g_imaginary = g.imaginary + h * point;
    const A *x_real = x.real + h * point, *x_imaginary = x.imaginary + h * point;
    for (int64_t d = 0; d < point; d += LANES<A>) {
      const Vector<A> g_re = load(g_real + d), g_im = load(g_imaginary + d);
      const Vector<A> x_re = load(x_real + d), x_im = load(x_imaginary + d);
      store(sums + d, load(sums + d) + (g_re * x_re + g_im * x_im));
      store(sums + point + d, load(sums + point + d) + (g_im * x_re - g_re * x_im));
    }
  }
}

// Sums of a piece [K, H, parts, channels] to the layout of the weight, mirror images counted.
template <typename A>
static void pack_sums(const Spectrum<A>& s, const A* sums, int64_t channels, const Piece& piece, A* weight) {
  const int64_t parts = s.parts(), point = piece.vectors * LANES<A>;
  for (int64_t k = 0; k < s.in_a_row(); ++k) {
    const A count = s.multiplicity(k);
    for (int64_t h = 0; h < s.height; ++h, sums += parts * point) {
      A* to = weight + ((h * s.in_a_row() + k) * channels + piece.channel) * parts;
      if (s.fourier) {
        for (int64_t d = 0; d < piece.count; ++d) to[2 * d] = count * sums[d], to[2 * d + 1] = count * sums[point + d];
      } else {
        for (int64_t d = 0; d < piece.count; ++d) to[d] = sums[d];
      }
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void sums(const FilteredBackwardWeight<T>& p, int64_t begin, int64_t end, A* scratch) {
  const Spectrum<A>& s = p.spectrum;
  const int64_t segments = p.segments();
  A* sums = scratch + 2 * s.scratch();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / segments, segment = task % segments;
    const int64_t first = segment * p.SEGMENT, behind = first + p.SEGMENT;
    const int64_t last = behind < p.batch ? behind : p.batch;
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const Stages<A> of_grad(s, piece, scratch), of_x(s, piece, scratch + s.scratch());
      const int64_t column = s.height * s.parts() * of_x.point;
      std::memset(sums, 0, size_t(s.in_a_row() * column) * sizeof(A));
      for (int64_t b = first; b < last; ++b) {
        const T* grad = p.grad + b * p.grad_stride_batch + p.prefix * p.grad_stride_token + piece.channel;
        const T* x = p.x + b * p.stride_batch + p.prefix * p.stride_token + piece.channel;
        of_grad.rows_forward(grad, p.grad_stride_token);
        of_x.rows_forward(x, p.stride_token);
        const bool more = b + 1 < last;
        for (int64_t k = 0; k < s.in_a_row(); ++k) {
          of_grad.prefetch_share(k, more ? grad + p.grad_stride_batch : grad, p.grad_stride_token);
          of_x.prefetch_share(k, more ? x + p.stride_batch : x, p.stride_token);
          add_products(of_x, of_grad.column_forward(k), of_x.column_forward(k), sums + k * column);
        }
      }
      pack_sums(s, sums, p.channels, piece, p.partial + segment * p.elements());
    });
  }
}

template <typename T, typename A = Accumulate<T>>
static void finish(const FilteredBackwardWeight<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += LANES<A>) {
    const int64_t count = end - i < LANES<A> ? end - i : LANES<A>;
    Vector<A> total = {};
    for (int64_t segment = 0; segment < p.segments(); ++segment) {
      const A* from = p.partial + segment * p.elements() + i;
      total += count == LANES<A> ? load(from) : load(from, count);
    }
    count == LANES<A> ? store(p.grad_weight + i, total) : store(p.grad_weight + i, total, count);
  }
}
