// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/analysis.h.
#include "cpu/spectral/lines_kernels.h"

// Whole vectors of channels of one batch element. `next`: what will be read next, fetched while columns are computed.
template <typename T, typename A = Accumulate<T>>
static void analysis_block(const Analysis<T>& p, const T* x, int64_t stride_x, T* real, T* imaginary, int64_t stride_y,
                           int64_t vectors, bool streamed, const T* next, A* tile, A* scratch) {
  const int64_t kept = p.kept(), new_height = p.new_height(), point = vectors * LANES<A>, row = 2 * kept * point;
  if (!p.along_h.outputs) {
    for (int64_t h = 0; h < p.height; ++h) {
      const int64_t first = h * kept * stride_y;
      transform<T, T, A>(p.along_w, {x + h * p.width * stride_x, stride_x},
                         {real + first, stride_y, imaginary + first, kept}, vectors, scratch);
    }
    return;
  }
  for (int64_t h = 0; h < p.height; ++h) {
    transform<T, A, A>(p.along_w, {x + h * p.width * stride_x, stride_x}, {tile + h * row, point}, vectors, scratch);
  }
  for (int64_t k = 0, fetched = 0; k < kept; ++k) {
    transform_to<A, T, A>(streamed, p.along_h, {tile + k * point, row, tile + (kept + k) * point, p.height},
                          {real + k * stride_y, kept * stride_y, imaginary + k * stride_y, new_height}, vectors,
                          scratch);
    const int64_t share = (k + 1) * p.points() / kept;
    if (next) prefetch(next + fetched * stride_x, stride_x, share - fetched, point);
    fetched = share;
  }
}

template <typename T, typename A = Accumulate<T>>
static void analysis_tasks(const Analysis<T>& p, int64_t begin, int64_t end, A* scratch) {
  const int64_t blocks = p.channel_blocks();
  A* tile = scratch + p.line_scratch();
  T* padded = reinterpret_cast<T*>(tile + p.tile());
  const bool streamable = p.streamable();
  const auto start = [&](int64_t task) {
    return p.x + task / blocks * p.stride_batch + p.prefix * p.stride_token + task % blocks * BLOCK_CHANNELS;
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, channel = task % blocks * BLOCK_CHANNELS;
    const int64_t count = p.channels - channel < BLOCK_CHANNELS ? p.channels - channel : BLOCK_CHANNELS;
    const int64_t whole = count - count % LANES<A>, rest = count - whole;
    const T *x = start(task), *next = task + 1 < end ? start(task + 1) : nullptr;
    T* real = p.real + b * p.coefficients() * p.channels + channel;
    T* imaginary = p.imaginary + b * p.coefficients() * p.channels + channel;
    if (whole) {
      const bool streamed = streamable && whole * sizeof(T) % 64 == 0;
      analysis_block<T>(p, x, p.stride_token, real, imaginary, p.channels, whole / LANES<A>, streamed, next, tile,
                        scratch);
    }
    if (rest) {
      T *padded_real = padded + p.points() * LANES<A>, *padded_imaginary = padded_real + p.coefficients() * LANES<A>;
      copy_channels(x + whole, p.stride_token, padded, LANES<A>, p.points(), rest);
      analysis_block<T>(p, padded, LANES<A>, padded_real, padded_imaginary, LANES<A>, 1, false, nullptr, tile, scratch);
      copy_channels(padded_real, LANES<A>, real + whole, p.channels, p.coefficients(), rest);
      copy_channels(padded_imaginary, LANES<A>, imaginary + whole, p.channels, p.coefficients(), rest);
    }
  }
  if (streamable) fence();
}
