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

// y = line(x) for `vectors` consecutive vectors of channels. x and y may be of any element type that accumulates in A,
// and may be the same memory. `scratch` holds line.scratch() elements, aligned to vectors.
template <typename In, typename Out, typename A>
void transform(const Line<A>& line, Place<const In> x, Place<Out> y, int64_t vectors, A* scratch);

// Copies past the caches to a place that is not read again soon: no line of it is read first. `to` is aligned to 64
// bytes and `bytes` is a multiple of 64. Stores are in order again after `fence()`.
static inline void stream(void* to, const void* from, int64_t bytes) {
#if MLIP_X86
  float* out = static_cast<float*>(to);
  const float* in = static_cast<const float*>(from);
  for (int64_t i = 0; i < bytes / 4; i += MLIP_VECTOR_BYTES / 4) {
#if MLIP_VECTOR_BYTES == 64
    _mm512_stream_ps(out + i, _mm512_loadu_ps(in + i));
#elif MLIP_VECTOR_BYTES == 32
    _mm256_stream_ps(out + i, _mm256_loadu_ps(in + i));
#else
    _mm_stream_ps(out + i, _mm_loadu_ps(in + i));
#endif
  }
#else
  std::memcpy(to, from, size_t(bytes));
#endif
}

static inline void fence() {
#if MLIP_X86
  _mm_sfence();
#endif
}

// `transform`, whose outputs leave through a buffer behind the scratch of the line if `streamed`.
template <typename In, typename Out, typename A>
static void transform_to(bool streamed, const Line<A>& line, const Place<const In>& x, const Place<Out>& y,
                         int64_t vectors, A* scratch) {
  if (!streamed) {
    transform<In, Out, A>(line, x, y, vectors, scratch);
    return;
  }
  Out* buffer = reinterpret_cast<Out*>(scratch + line.scratch());
  const int64_t point = vectors * LANES<A>;
  transform<In, Out, A>(line, x, {buffer, point}, vectors, scratch);
  for (int64_t m = 0; m < line.outputs; ++m) stream(y[m], buffer + m * point, point * int64_t(sizeof(Out)));
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
