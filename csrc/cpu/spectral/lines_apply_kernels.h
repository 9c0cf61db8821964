// Applies a Line (cpu/spectral/lines.h); declared in cpu/spectral/lines_kernels.h. Compiled once per instruction set,
// by cpu/spectral/lines_apply.cpp.
#include "cpu/spectral/lines_kernels.h"

#define MLIP_UNROLL _Pragma("GCC unroll 8")

// Most vectors of channels that are computed together, given 32 or 16 registers.
constexpr int WIDEST = MLIP_VECTOR_BYTES == 64 ? 4 : 2;

// Terms that are added one by one; longer sums are sums of such sums, which round less.
constexpr int64_t SEGMENT = 64;

// R rows of a block times V vectors: from[n] holds V vectors for each column.
template <int R, int V, typename A>
static inline __attribute__((always_inline)) void panel(const A* coefficients, int64_t columns, const A* from,
                                                        Vector<A> (&sums)[R][V]) {
  MLIP_UNROLL
  for (int r = 0; r < R; ++r) {
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Vector<A>{};
  }
  for (int64_t n = 0; n < columns; ++n) {
    Vector<A> x[V];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load(from + (n * V + v) * LANES<A>);
    MLIP_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vector<A> c = broadcast(coefficients[n * R + r]);
      MLIP_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += c * x[v];
    }
  }
}

template <int R, int V, bool DIRECT, typename A>
static void panel_to(const A* coefficients, int64_t columns, const A* from, const typename Line<A>::Single* targets,
                     const Place<A>& y, A* to) {
  Vector<A> sums[R][V];
  panel<R, V, A>(coefficients, columns < SEGMENT ? columns : SEGMENT, from, sums);
  for (int64_t n = SEGMENT; n < columns; n += SEGMENT) {
    const int64_t count = columns - n < SEGMENT ? columns - n : SEGMENT;
    Vector<A> segment[R][V];
    panel<R, V, A>(coefficients + n * R, count, from + n * V * LANES<A>, segment);
    MLIP_UNROLL
    for (int r = 0; r < R; ++r) {
      MLIP_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += segment[r][v];
    }
  }
  MLIP_UNROLL
  for (int r = 0; r < R; ++r) {
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      if constexpr (DIRECT) {
        store(y[targets[r].index] + v * LANES<A>, sums[r][v]);
      } else {
        store(to + (r * V + v) * LANES<A>, sums[r][v]);
      }
    }
  }
}

// Output slots in `to`, or the outputs themselves in y.
template <int V, bool DIRECT, typename A>
static __attribute__((noinline)) void blocks(const Line<A>& line, const A* from, const Place<A>& y, A* to) {
  constexpr int PANEL = Line<A>::PANEL;
  for (const auto& block : line.blocks) {
    const int64_t panels = (block.rows + PANEL - 1) / PANEL;
    const A* coefficients = block.coefficients;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = i * block.rows / panels, rows = (i + 1) * block.rows / panels - first;
      const A* in = from + int64_t(block.column) * V * LANES<A>;
      A* out = to + (block.row + first) * V * LANES<A>;
      const auto* targets = line.output_singles.items + block.row + first;
      switch (rows) {
        case 1:
          panel_to<1, V, DIRECT>(coefficients, block.columns, in, targets, y, out);
          break;
        case 2:
          panel_to<2, V, DIRECT>(coefficients, block.columns, in, targets, y, out);
          break;
        case 3:
          panel_to<3, V, DIRECT>(coefficients, block.columns, in, targets, y, out);
          break;
        case 4:
          panel_to<4, V, DIRECT>(coefficients, block.columns, in, targets, y, out);
          break;
        case 5:
          panel_to<5, V, DIRECT>(coefficients, block.columns, in, targets, y, out);
          break;
        default:
          panel_to<6, V, DIRECT>(coefficients, block.columns, in, targets, y, out);
      }
      coefficients += rows * block.columns;
    }
  }
}

template <int V, typename A>
static void add_pairs(typename Line<A>::template List<typename Line<A>::Pair> pairs, A* slots) {
  for (const auto& pair : pairs) {
    A *to_a = slots + int64_t(pair.a) * V * LANES<A>, *to_b = slots + int64_t(pair.b) * V * LANES<A>;
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector<A> a = load(to_a + v * LANES<A>), b = load(to_b + v * LANES<A>);
      store(to_a + v * LANES<A>, a + b);
      store(to_b + v * LANES<A>, a - b);
    }
  }
}

// Inputs into their slots.
template <int V, typename In, typename A>
static __attribute__((noinline)) void gather(const Line<A>& line, const Place<const In>& x, A* slots) {
  for (const auto& fold : line.input_folds) {
    const In *first = x[fold.first], *second = x[fold.second];
    A* to_a = slots + int64_t(fold.slots.a) * V * LANES<A>;
    A* to_b = slots + int64_t(fold.slots.b) * V * LANES<A>;
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector<A> a = load(first + v * LANES<A>), b = load(second + v * LANES<A>);
      store(to_a + v * LANES<A>, a + b);
      store(to_b + v * LANES<A>, a - b);
    }
  }
  for (const auto& single : line.input_singles) {
    const In* from = x[single.index];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) store(slots + (int64_t(single.slot) * V + v) * LANES<A>, load(from + v * LANES<A>));
  }
}

// Outputs out of their slots.
template <int V, typename Out, typename A>
static __attribute__((noinline)) void spread(const Line<A>& line, const A* slots, const Place<Out>& y) {
  for (const auto& fold : line.output_folds) {
    const A* from_a = slots + int64_t(fold.slots.a) * V * LANES<A>;
    const A* from_b = slots + int64_t(fold.slots.b) * V * LANES<A>;
    Out *first = y[fold.first], *second = y[fold.second];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector<A> a = load(from_a + v * LANES<A>), b = load(from_b + v * LANES<A>);
      store(first + v * LANES<A>, a + b);
      store(second + v * LANES<A>, a - b);
    }
  }
  for (const auto& single : line.output_singles) {
    Out* to = y[single.index];
    MLIP_UNROLL
    for (int v = 0; v < V; ++v) store(to + v * LANES<A>, load(slots + (int64_t(single.slot) * V + v) * LANES<A>));
  }
}

// Outputs that need no sums and no other type are stored by the blocks.
template <int V, typename A>
static bool blocks_to(const Line<A>& line, const A* in, const Place<A>& y) {
  if (line.output_folds.count || line.output_pairs.count) return false;
  blocks<V, true, A>(line, in, y, nullptr);
  return true;
}
template <int V, typename A, typename Out>
static bool blocks_to(const Line<A>&, const A*, const Place<Out>&) {
  return false;
}

// V vectors of channels of one line.
template <int V, typename In, typename Out, typename A>
static void apply(const Line<A>& line, const Place<const In>& x, const Place<Out>& y, A* scratch) {
  A *in = scratch, *out = scratch + line.inputs * V * LANES<A>;
  gather<V, In, A>(line, x, in);
  add_pairs<V, A>(line.input_pairs, in);
  if (blocks_to<V>(line, in, y)) return;
  blocks<V, false, A>(line, in, {}, out);
  add_pairs<V, A>(line.output_pairs, out);
  spread<V, Out, A>(line, out, y);
}

// Lines of compiled lengths: float to float only, other types pass by a scratch that stays in the first level cache.
template <typename In, typename Out>
static void transform_compiled(const Line<float>& line, const Place<const In>& x, const Place<Out>& y, int64_t vectors,
                               float* scratch) {
  const Widened in = widened(x.first, x.stride, line.inputs, vectors, scratch);
  const Unnarrowed<Out> out(y.first, y.stride, vectors, scratch + line.inputs * BLOCK_CHANNELS);
  transform_short(line, in.data, in.stride, out.data, out.stride, vectors);
  out.narrow(line.outputs);
}

template <typename In, typename Out, typename A>
void transform(const Line<A>& line, Place<const In> x, Place<Out> y, int64_t vectors, A* scratch) {
  if constexpr (SHORT_LINES<A>) {
    if (line.compiled != Compiled::no) return transform_compiled(line, x, y, vectors, scratch);
  }
  const auto advance = [&](int count) {
    x.first += count * LANES<A>, y.first += count * LANES<A>, vectors -= count;
    if (x.second) x.second += count * LANES<A>;
    if (y.second) y.second += count * LANES<A>;
  };
  for (; vectors >= WIDEST; advance(WIDEST)) apply<WIDEST>(line, x, y, scratch);
  if (WIDEST > 2 && vectors >= 2) apply<2>(line, x, y, scratch), advance(2);
  if (vectors > 0) apply<1>(line, x, y, scratch);
}

#define MLIP_TRANSFORM(In, Out, A) \
  template void transform<In, Out, A>(const Line<A>&, Place<const In>, Place<Out>, int64_t, A*)
MLIP_TRANSFORM(float, float, float);
MLIP_TRANSFORM(double, double, double);
MLIP_TRANSFORM(BFloat16, float, float);
MLIP_TRANSFORM(float, BFloat16, float);
MLIP_TRANSFORM(BFloat16, BFloat16, float);
MLIP_TRANSFORM(Half, float, float);
MLIP_TRANSFORM(float, Half, float);
MLIP_TRANSFORM(Half, Half, float);
#undef MLIP_TRANSFORM
#undef MLIP_UNROLL
