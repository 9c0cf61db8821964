// Kernels of cpu/spectral/filter.h.
#include "cpu/spectral/filter.h"

#include "cpu/spectral/spectrum.h"

#define MLIP_KERNELS "cpu/spectral/filter.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

// The weight of a piece as [K, H, parts, channels], mirror images counted.
template <typename A>
static void unpack_weight(const Spectrum<A>& s, const A* weight, int64_t channels, const Piece& piece, A* to) {
  const int64_t parts = s.parts(), point = piece.vectors * LANES<A>;
  for (int64_t k = 0; k < s.num_bins(); ++k) {
    const A count = s.multiplicity(k);
    for (int64_t h = 0; h < s.height; ++h, to += parts * point) {
      const A* from = weight + ((h * s.num_bins() + k) * channels + piece.channel) * parts;
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
static void weigh(const BlockTransform<A>& transform, const Column<A>& c, const A* weight) {
  const int64_t point = transform.point;
  if (!transform.s.fourier) {
    for (int64_t h = 0; h < transform.s.height; ++h, weight += point) {
      A* at = c.real + h * point;
      for (int64_t d = 0; d < point; d += LANES<A>) store(at + d, load(at + d) * load(weight + d));
    }
    return;
  }
  for (int64_t h = 0; h < transform.s.height; ++h, weight += 2 * point) {
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
static void filtered(const Filtered<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  const Spectrum<A>& s = p.spectrum;
  A *scratch = memory.as<A>(), *weight = scratch + s.scratch();
  for_blocks(begin, end, p.batch, [&](int64_t block, int64_t first, int64_t last) {
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const BlockTransform<A> transform(s, piece, scratch);
      unpack_weight(s, p.weight, p.channels, piece, weight);
      for (int64_t b = first; b < last; ++b) {
        const T* x = p.x + b * p.stride_batch + piece.channel;
        T* y = p.y + b * p.tokens() * p.channels + piece.channel;
        for (int64_t n = 0; n < p.prefix; ++n, x += p.stride_token, y += p.channels) {
          std::memcpy(static_cast<void*>(y), x, size_t(piece.count) * sizeof(T));
        }
        transform.rows_forward(x, p.stride_token);
        const T* next = b + 1 < last ? x + p.stride_batch : x;
        for (int64_t k = 0; k < s.num_bins(); ++k) {
          transform.prefetch_next(k, next, p.stride_token);
          weigh(transform, transform.column_forward(k), weight + k * s.height * s.parts() * transform.point);
          transform.column_back(k);
        }
        transform.rows_back(y, p.channels, p.streamed(p.y));
      }
    });
  });
}

// sums [H, parts, channels] += conj(x) g along a column.
template <typename A>
static void add_products(const BlockTransform<A>& transform, const Column<A>& g, const Column<A>& x, A* sums) {
  const int64_t point = transform.point;
  if (!transform.s.fourier) {
    for (int64_t h = 0; h < transform.s.height; ++h, sums += point) {
      const A *g_at = g.real + h * point, *x_at = x.real + h * point;
      for (int64_t d = 0; d < point; d += LANES<A>) store(sums + d, load(sums + d) + load(g_at + d) * load(x_at + d));
    }
    return;
  }
  for (int64_t h = 0; h < transform.s.height; ++h, sums += 2 * point) {
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
  for (int64_t k = 0; k < s.num_bins(); ++k) {
    const A count = s.multiplicity(k);
    for (int64_t h = 0; h < s.height; ++h, sums += parts * point) {
      A* to = weight + ((h * s.num_bins() + k) * channels + piece.channel) * parts;
      if (s.fourier) {
        for (int64_t d = 0; d < piece.count; ++d) to[2 * d] = count * sums[d], to[2 * d + 1] = count * sums[point + d];
      } else {
        for (int64_t d = 0; d < piece.count; ++d) to[d] = sums[d];
      }
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void filtered_backward_weight_sums(const FilteredBackwardWeight<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  const Spectrum<A>& s = p.spectrum;
  const int64_t segments = p.segments();
  A *scratch = memory.as<A>(), *sums = scratch + 2 * s.scratch();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / segments, segment = task % segments;
    const int64_t first = segment * p.SEGMENT, behind = first + p.SEGMENT;
    const int64_t last = behind < p.batch ? behind : p.batch;
    for_pieces<A>(p.channels, block, [&](const Piece& piece) {
      const BlockTransform<A> of_grad(s, piece, scratch), of_x(s, piece, scratch + s.scratch());
      const int64_t column = s.height * s.parts() * of_x.point;
      std::memset(sums, 0, size_t(s.num_bins() * column) * sizeof(A));
      for (int64_t b = first; b < last; ++b) {
        const T* grad = p.grad + b * p.grad_stride_batch + p.prefix * p.grad_stride_token + piece.channel;
        const T* x = p.grid(b, piece.channel);
        of_grad.rows_forward(grad, p.grad_stride_token);
        of_x.rows_forward(x, p.stride_token);
        const bool more = b + 1 < last;
        for (int64_t k = 0; k < s.num_bins(); ++k) {
          of_grad.prefetch_next(k, more ? grad + p.grad_stride_batch : grad, p.grad_stride_token);
          of_x.prefetch_next(k, more ? x + p.stride_batch : x, p.stride_token);
          add_products(of_x, of_grad.column_forward(k), of_x.column_forward(k), sums + k * column);
        }
      }
      pack_sums(s, sums, p.channels, piece, p.partial + segment * p.elements());
    });
  }
}

template <typename T, typename A = Accumulate<T>>
static void filtered_backward_weight_finish(const FilteredBackwardWeight<T>& p, int64_t begin, int64_t end) {
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

#else
MLIP_DEFINE_DISPATCH(filtered, Filtered)
MLIP_DEFINE_DISPATCH(filtered_backward_weight_sums, FilteredBackwardWeight)
MLIP_DEFINE_DISPATCH(filtered_backward_weight_finish, FilteredBackwardWeight)
#endif
