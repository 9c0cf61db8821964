// Applies a Line (cpu/spectral/lines.h) to channels. Included by every *_kernels.h that does; the code itself is
// compiled once, by cpu/spectral/lines_apply.cpp.

// Where the points of an axis lie: point i at first + i * stride, points from `split` on at second + (i - split) *
// stride (imaginary parts, or those of another tensor).
template <typename T>
struct Place {
  T* first;
  int64_t stride;
  T* second = nullptr;
  int64_t split = INT64_MAX;

  __attribute__((always_inline)) T* operator[](int64_t i) const {
    return i < split ? first + i * stride : second + (i - split) * stride;
  }
};

// y = line(x) for `vectors` consecutive vectors of channels, at most BLOCK_CHANNELS channels. x and y may be of any
// element type that accumulates in A, and may be the same memory. `scratch` holds line.scratch() elements, aligned to
// vectors.
template <typename In, typename Out, typename A>
void transform(const Line<A>& line, Place<const In> x, Place<Out> y, int64_t vectors, A* scratch);

// Whether code for short lengths is compiled (`has_short_lines` says the same at run time).
template <typename A>
constexpr bool SHORT_LINES = false;
template <>
constexpr bool SHORT_LINES<float> = MLIP_VECTOR_BYTES > 16 || !MLIP_X86;

// y = line(x) where line.compiled says so. By cpu/spectral/lines_short.cpp.
void transform_short(const Line<float>& line, const float* x, int64_t stride_x, float* y, int64_t stride_y,
                     int64_t vectors);

// Points of an axis as float: where they are, or widened into `scratch`.
struct Widened {
  const float* data;
  int64_t stride;
};
static inline Widened widened(const float* x, int64_t stride, int64_t, int64_t, float*) { return {x, stride}; }
template <typename T>
static Widened widened(const T* x, int64_t stride, int64_t points, int64_t vectors, float* scratch) {
  const int64_t point = vectors * LANES<float>;
  for (int64_t n = 0; n < points; ++n) {
    for (int64_t d = 0; d < point; d += LANES<float>) store(scratch + n * point + d, load(x + n * stride + d));
  }
  return {scratch, point};
}

// Where float points go that are to be T at y: there, or to `scratch` until they are narrowed.
template <typename T>
struct Unnarrowed {
  T* y;
  int64_t stride_y;
  float* data;
  int64_t stride;

  Unnarrowed(T* to, int64_t stride_to, int64_t vectors, float* scratch)
      : y(to), stride_y(stride_to), data(scratch), stride(vectors * LANES<float>) {}
  void narrow(int64_t points) const {
    for (int64_t n = 0; n < points; ++n) {
      for (int64_t d = 0; d < stride; d += LANES<float>) store(y + n * stride_y + d, load(data + n * stride + d));
    }
  }
};
template <>
struct Unnarrowed<float> {
  float* data;
  int64_t stride;

  Unnarrowed(float* to, int64_t stride_to, int64_t, float*) : data(to), stride(stride_to) {}
  void narrow(int64_t) const {}
};

// Channels of a point past the caches, to a place that is not read again soon: no line of it is read first.
template <typename T, typename A>
static inline void stream_channels(T* to, const A* from, int64_t channels) {
  for (int64_t d = 0; d < channels; d += LANES<A>) stream(to + d, load(from + d));
}

// `transform`, whose outputs leave through a buffer behind the scratch of the line if `streamed`.
template <typename In, typename Out, typename A>
static void transform_to(bool streamed, const Line<A>& line, const Place<const In>& x, const Place<Out>& y,
                         int64_t vectors, A* scratch) {
  if (!streamed) {
    transform<In, Out, A>(line, x, y, vectors, scratch);
    return;
  }
  A* buffer = scratch + line.scratch();
  const int64_t point = vectors * LANES<A>;
  transform<In, A, A>(line, x, {buffer, point}, vectors, scratch);
  for (int64_t m = 0; m < line.outputs; ++m) stream_channels(y[m], buffer + m * point, point);
}

// Asks for `channels` channels of a row of tokens that will be read soon.
template <typename T>
static inline void prefetch(const T* tokens, int64_t stride, int64_t count, int64_t channels) {
  for (int64_t n = 0; n < count; ++n) {
    const char* from = reinterpret_cast<const char*>(tokens + n * stride);
    for (int64_t i = 0; i < channels * int64_t(sizeof(T)); i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

// The first `count` channels of `tokens` tokens.
template <typename T>
static void copy_channels(const T* from, int64_t stride_from, T* to, int64_t stride_to, int64_t tokens, int64_t count) {
  for (int64_t n = 0; n < tokens; ++n) {
    std::memcpy(to + n * stride_to, from + n * stride_from, size_t(count) * sizeof(T));
  }
}
