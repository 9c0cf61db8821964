// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/separable.h.
#include "cpu/spectral/lines_kernels.h"

// Whole vectors of channels of one batch element. `next`: what will be read next, fetched while columns are computed.
template <typename T, typename A = Accumulate<T>>
static void separable_block(const Separable<T>& p, const T* x, int64_t stride_x, T* y, int64_t stride_y,
                            int64_t vectors, bool streamed, const T* next, A* tile, A* scratch) {
  const int64_t width = p.along_w.outputs, point = vectors * LANES<A>;
  for (int64_t n = 0; n < p.prefix; ++n) std::memcpy(y + n * stride_y, x + n * stride_x, size_t(point) * sizeof(T));
  x += p.prefix * stride_x, y += p.prefix * stride_y;
  if (!p.along_h.outputs) {
    for (int64_t h = 0; h < p.height; ++h) {
      transform<T, T, A>(p.along_w, {x + h * p.width * stride_x, stride_x}, {y + h * width * stride_y, stride_y},
                         vectors, scratch);
    }
    return;
  }
  for (int64_t h = 0; h < p.height; ++h) {
    transform<T, A, A>(p.along_w, {x + h * p.width * stride_x, stride_x}, {tile + h * width * point, point}, vectors,
                       scratch);
  }
  const int64_t tokens = p.tokens();
  for (int64_t w = 0, fetched = 0; w < width; ++w) {
    transform_to<A, T, A>(streamed, p.along_h, {tile + w * point, width * point}, {y + w * stride_y, width * stride_y},
                          vectors, scratch);
    const int64_t share = (w + 1) * tokens / width;
    if (next) prefetch(next + fetched * stride_x, stride_x, share - fetched, point);
    fetched = share;
  }
}

template <typename T, typename A = Accumulate<T>>
static void separable_tasks(const Separable<T>& p, int64_t begin, int64_t end, A* scratch) {
  const int64_t blocks = p.channel_blocks();
  A* tile = scratch + p.line_scratch();
  T* padded = reinterpret_cast<T*>(tile + p.tile());
  const bool streamable = p.streamable();
  const auto start = [&](int64_t task) {
    return p.x + task / blocks * p.stride_batch + task % blocks * BLOCK_CHANNELS;
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, channel = task % blocks * BLOCK_CHANNELS;
    const int64_t count = p.channels - channel < BLOCK_CHANNELS ? p.channels - channel : BLOCK_CHANNELS;
    const int64_t whole = count - count % LANES<A>, rest = count - whole;
    const T *x = start(task), *next = task + 1 < end ? start(task + 1) : nullptr;
    T* y = p.y + b * p.new_tokens() * p.channels + channel;
    if (whole) {
      const bool streamed = streamable && whole * sizeof(T) % 64 == 0;
      separable_block<T>(p, x, p.stride_token, y, p.channels, whole / LANES<A>, streamed, next, tile, scratch);
    }
    if (rest) {
      T* result = padded + p.tokens() * LANES<A>;
      copy_channels(x + whole, p.stride_token, padded, LANES<A>, p.tokens(), rest);
      separable_block<T>(p, padded, LANES<A>, result, LANES<A>, 1, false, nullptr, tile, scratch);
      copy_channels(result, LANES<A>, y + whole, p.channels, p.new_tokens(), rest);
    }
  }
  if (streamable) fence();
}
