// Compiled once per instruction set (cpu/simd.h). What it does is said in cpu/spectral/synthesis.h.
#include "cpu/spectral/lines_kernels.h"

template <typename T>
struct HalfSpectrum {
  const T *real, *imaginary;  // null where there is none
  int64_t stride_row, stride_coefficient;
};

// Whole vectors of channels of one batch element. `next`: what will be read next, fetched while rows are computed.
template <typename T, typename A = Accumulate<T>>
static void synthesis_block(const Synthesis<T>& p, const HalfSpectrum<T>& z, T* y, int64_t stride_y, int64_t vectors,
                            bool streamed, const HalfSpectrum<T>& next, A* tile, A* scratch) {
  const int64_t kept = p.kept, new_height = p.new_height(), new_width = p.along_w.outputs;
  const int64_t point = vectors * LANES<A>, row = 2 * kept * point;
  for (int64_t n = 0; n < p.prefix; ++n)
    std::memset(static_cast<void*>(y + n * stride_y), 0, size_t(point) * sizeof(T));
  y += p.prefix * stride_y;
  if (!p.along_h.outputs) {
    for (int64_t h = 0; h < p.height; ++h) {
      transform<T, T, A>(p.along_w,
                         {z.real + h * z.stride_row, z.stride_coefficient, z.imaginary + h * z.stride_row, kept},
                         {y + h * new_width * stride_y, stride_y}, vectors, scratch);
    }
    return;
  }
  for (int64_t k = 0; k < kept; ++k) {
    const int64_t column = k * z.stride_coefficient;
    transform<T, A, A>(p.along_h, {z.real + column, z.stride_row, z.imaginary + column, p.height},
                       {tile + k * point, row, tile + (kept + k) * point, new_height}, vectors, scratch);
  }
  for (int64_t h = 0, fetched = 0; h < new_height; ++h) {
    transform_to<A, T, A>(streamed, p.along_w, {tile + h * row, point}, {y + h * new_width * stride_y, stride_y},
                          vectors, scratch);
    const int64_t share = (h + 1) * p.height / new_height;
    for (; next.real && fetched < share; ++fetched) {
      prefetch(next.real + fetched * next.stride_row, next.stride_coefficient, kept, point);
      prefetch(next.imaginary + fetched * next.stride_row, next.stride_coefficient, kept, point);
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void synthesis_tasks(const Synthesis<T>& p, int64_t begin, int64_t end, A* scratch) {
  const int64_t blocks = p.channel_blocks(), coefficients = p.height * p.kept;
  A* tile = scratch + p.line_scratch();
  T* padded = reinterpret_cast<T*>(tile + p.tile());
  const bool streamable = p.streamable();
  const auto start = [&](int64_t task) {
    const int64_t first = task / blocks * p.stride_batch + task % blocks * BLOCK_CHANNELS;
    return HalfSpectrum<T>{p.real + first, p.imaginary + first, p.stride_row, p.stride_coefficient};
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, channel = task % blocks * BLOCK_CHANNELS;
    const int64_t count = p.channels - channel < BLOCK_CHANNELS ? p.channels - channel : BLOCK_CHANNELS;
    const int64_t whole = count - count % LANES<A>, rest = count - whole;
    const HalfSpectrum<T> z = start(task), next = task + 1 < end ? start(task + 1) : HalfSpectrum<T>{};
    T* y = p.y + b * p.new_tokens() * p.channels + channel;
    if (whole) {
      const bool streamed = streamable && whole * sizeof(T) % 64 == 0;
      synthesis_block<T>(p, z, y, p.channels, whole / LANES<A>, streamed, next, tile, scratch);
    }
    if (rest) {
      T *real = padded, *imaginary = real + coefficients * LANES<A>, *result = imaginary + coefficients * LANES<A>;
      for (int64_t h = 0; h < p.height; ++h) {
        const int64_t from = h * z.stride_row + whole, to = h * p.kept * LANES<A>;
        copy_channels(z.real + from, z.stride_coefficient, real + to, LANES<A>, p.kept, rest);
        copy_channels(z.imaginary + from, z.stride_coefficient, imaginary + to, LANES<A>, p.kept, rest);
      }
      synthesis_block<T>(p, {real, imaginary, p.kept * LANES<A>, LANES<A>}, result, LANES<A>, 1, false, {}, tile,
                         scratch);
      copy_channels(result, LANES<A>, y + whole, p.channels, p.new_tokens(), rest);
    }
  }
  if (streamable) fence();
}
