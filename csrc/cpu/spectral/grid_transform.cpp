// Kernels of cpu/spectral/grid_transform.h: padding of channels, the two axes, and the tile between them.
#include "cpu/spectral/grid_transform.h"

#include "cpu/spectral/axis_transform.h"

#define MLIP_KERNELS "cpu/spectral/grid_transform.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

// Whole vectors of channels of one batch element. `next`: what will be read next, or empty.
template <typename T, typename A = Accumulate<T>>
static void transform_block(const GridTransform<T>& p, const Grid<const T>& x, const Grid<T>& y, int64_t vectors,
                            bool streamed, const Grid<const T>& next, A* tile_memory, A* scratch) {
  if (!p.matrix_h.outputs) {
    for (int64_t h = 0; h < x.rows; ++h) transform<T, T, A>(p.matrix_w, x.row(h), y.row(h), vectors, scratch);
    return;
  }
  const int64_t point = vectors * LANES<A>;
  const Grid<A> tile = p.tile(tile_memory, point);
  const auto prefetch_next = [&](int64_t step, int64_t steps) __attribute__((always_inline)) {
    for (int64_t h = step * next.rows / steps; h < (step + 1) * next.rows / steps; ++h) {
      prefetch(next.real + h * next.stride_row, next.stride_column, next.columns, point);
      if (next.imaginary) prefetch(next.imaginary + h * next.stride_row, next.stride_column, next.columns, point);
    }
  };
  if (p.rows_first()) {
    for (int64_t h = 0; h < x.rows; ++h) {
      const Strided<A> row{tile.real + h * tile.stride_row, point};  // both parts
      transform<T, A, A>(p.matrix_w, x.row(h), row, vectors, scratch);
    }
    for (int64_t w = 0; w < y.columns; ++w) {
      const Strided<A> from = tile.column(w);
      transform_to<A, T, A>(streamed, p.matrix_h, {from.first, from.stride, from.second, from.split}, y.column(w),
                            vectors, scratch);
      prefetch_next(w, y.columns);
    }
  } else {
    for (int64_t w = 0; w < x.columns; ++w) {
      transform<T, A, A>(p.matrix_h, x.column(w), tile.column(w), vectors, scratch);
    }
    for (int64_t h = 0; h < y.rows; ++h) {
      const Strided<const A> row{tile.real + h * tile.stride_row, point};
      transform_to<A, T, A>(streamed, p.matrix_w, row, y.row(h), vectors, scratch);
      prefetch_next(h, y.rows);
    }
  }
}

// The first `count` channels of all positions.
template <typename From, typename To>
static void copy_channels(const Grid<From>& from, const Grid<To>& to, int64_t count) {
  for (int64_t h = 0; h < from.rows; ++h) {
    for (int64_t w = 0; w < from.columns; ++w) {
      const int64_t source = h * from.stride_row + w * from.stride_column;
      const int64_t target = h * to.stride_row + w * to.stride_column;
      std::memcpy(to.real + target, from.real + source, size_t(count) * sizeof(To));
      if (from.imaginary) std::memcpy(to.imaginary + target, from.imaginary + source, size_t(count) * sizeof(To));
    }
  }
}

// The shape of a grid with one vector of channels.
template <typename T, typename To>
static Grid<To> padded(const Grid<T>& grid, int64_t lanes, To* memory) {
  return {memory,    grid.imaginary ? memory + grid.positions() * lanes : nullptr,
          grid.rows, grid.columns,
          0,         grid.columns * lanes,
          lanes};
}

template <typename T, typename A = Accumulate<T>>
static void grid_transform(const GridTransform<T>& p, int64_t begin, int64_t end) {
  Scratch memory(size_t(p.scratch()) * sizeof(A));
  A *scratch = memory.as<A>(), *tile = scratch + p.axis_scratch();
  const Grid<T> padded_x = padded(p.x, LANES<A>, reinterpret_cast<T*>(tile + p.tile_scratch()));
  const Grid<T> padded_y = padded(p.y, LANES<A>, padded_x.real + p.x.parts() * p.x.positions() * LANES<A>);
  const Grid<const T> padded_input = padded(p.x, LANES<A>, static_cast<const T*>(padded_x.real));
  const int64_t blocks = p.channel_blocks();
  const bool streamable = p.streamable();
  const auto input = [&](int64_t task) {
    return task < end ? p.x.behind(task / blocks * p.x.stride_batch + task % blocks * BLOCK_CHANNELS) : Grid<const T>{};
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, channel = task % blocks * BLOCK_CHANNELS;
    const int64_t count = p.channels - channel < BLOCK_CHANNELS ? p.channels - channel : BLOCK_CHANNELS;
    const int64_t whole = count - count % LANES<A>, rest = count - whole;
    const Grid<const T> x = input(task);
    const Grid<T> y = p.y.behind(b * p.y.stride_batch + channel);
    for (int64_t n = -p.prefix; n < 0; ++n) {
      T* to = y.real + n * y.stride_column;
      if (x.imaginary) {
        std::memset(static_cast<void*>(to), 0, size_t(count) * sizeof(T));
      } else {
        std::memcpy(to, x.real + n * x.stride_column, size_t(count) * sizeof(T));
      }
    }
    if (whole) {
      const bool streamed = streamable && whole * sizeof(T) % 64 == 0;
      transform_block<T>(p, x, y, whole / LANES<A>, streamed, input(task + 1), tile, scratch);
    }
    if (rest) {
      copy_channels(x.behind(whole), padded_x, rest);
      transform_block<T>(p, padded_input, padded_y, 1, false, {}, tile, scratch);
      copy_channels(padded_y, y.behind(whole), rest);
    }
  }
  if (streamable) fence();
}

#else
MLIP_DEFINE_DISPATCH(grid_transform, GridTransform)
#endif
