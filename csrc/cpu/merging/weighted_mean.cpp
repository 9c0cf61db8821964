#include "cpu/merging/weighted_mean.h"

#define MLIP_KERNELS "cpu/merging/weighted_mean.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

constexpr int ROWS = 8;  // rows added in pairs before they reach the running sum: fewer passes over it, less rounding

// sums[d] += weights[0] rows[0][d] + ... + weights[ROWS - 1] rows[ROWS - 1][d]. The same columns `ahead` elements on,
// most likely those of the next ROWS rows, are prefetched: eight short streams are more than the hardware follows.
template <typename T, typename A = Accumulate<T>>
static void add_rows(const T* const* rows, const A* weights, int64_t channels, int64_t ahead, A* sums) {
  Vector<A> w[ROWS];
  const T* row[ROWS];  // copies, as a store to sums might change what `rows` points to
  for (int r = 0; r < ROWS; ++r) {
    w[r] = broadcast(weights[r]);
    row[r] = rows[r];
  }
  const int64_t whole = channels - channels % LANES<A>;
  for (int64_t d = 0; d < whole; d += LANES<A>) {
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(row[r] + d + ahead);
    Vector<A> pair[ROWS / 2];
    for (int r = 0; r < ROWS; r += 2) pair[r / 2] = w[r] * load(row[r] + d) + w[r + 1] * load(row[r + 1] + d);
    store(sums + d, load(sums + d) + ((pair[0] + pair[1]) + (pair[2] + pair[3])));
  }
  if (const int64_t rest = channels - whole) {
    Vector<A> group = {};
    for (int r = 0; r < ROWS; ++r) group += w[r] * load(row[r] + whole, rest);
    store(sums + whole, load(sums + whole, rest) + group, rest);
  }
}

// sums[d] += weight row[d]
template <typename T, typename A = Accumulate<T>>
static void add_row(const T* row, A weight, int64_t channels, A* sums) {
  const Vector<A> w = broadcast(weight);
  const int64_t whole = channels - channels % LANES<A>;
  for (int64_t d = 0; d < whole; d += LANES<A>) store(sums + d, load(sums + d) + w * load(row + d));
  if (const int64_t rest = channels - whole) {
    store(sums + whole, load(sums + whole, rest) + w * load(row + whole, rest), rest);
  }
}

// The mean of batch element b, from the partial sums of its segments.
template <typename T, typename A = Accumulate<T>>
static void write_mean(const WeightedMean<T>& p, int64_t b) {
  const int64_t segments = p.segments();
  double total = 0;
  for (int64_t s = 0; s < segments; ++s) total += double(p.partial_total[b * segments + s]);
  p.total[b] = A(total);
  const Vector<A> divisor = broadcast(p.total[b]);
  for (int64_t d = 0; d < p.channels; d += LANES<A>) {
    const int64_t count = p.channels - d < LANES<A> ? p.channels - d : LANES<A>;
    Vector<A> sums = {};
    for (int64_t s = 0; s < segments; ++s) sums += load(p.partial + (b * segments + s) * p.channels + d, count);
    store(p.mean + b * p.channels + d, p.total[b] == 0 ? Vector<A>{} : sums / divisor, count);
  }
}

template <typename T>
static void weighted_mean_finish(const WeightedMean<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) write_mean(p, b);
}

template <typename T, typename A = Accumulate<T>>
static void weighted_mean_sums(const WeightedMean<T>& p, int64_t begin, int64_t end) {
  const int64_t segments = p.segments();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / segments, segment = task % segments;
    A* partial = p.partial + task * p.channels;
    std::memset(partial, 0, size_t(p.channels) * sizeof(A));
    double total = 0;

    const T* rows[ROWS];
    A weights[ROWS];
    int waiting = 0;
    for (int64_t n = p.first_token(segment); n < p.last_token(segment); ++n) {
      const A weight = p.weight ? p.weight[b * p.tokens + n] : A(1);
      if (weight == 0) continue;  // left out whatever it holds, NaN included
      total += double(weight);
      rows[waiting] = p.x + b * p.stride_batch + n * p.stride_token;
      weights[waiting++] = weight;
      if (waiting == ROWS) {
        add_rows<T>(rows, weights, p.channels, ROWS * p.stride_token, partial);
        waiting = 0;
      }
    }
    for (int r = 0; r < waiting; ++r) add_row<T>(rows[r], weights[r], p.channels, partial);
    p.partial_total[task] = A(total);
    if (segments == 1) write_mean(p, b);
  }
}

template <typename T, typename A = Accumulate<T>>
static void weighted_mean_backward(const WeightedMean<T>& p, int64_t begin, int64_t end) {
  const int64_t segments = p.segments();
  const int64_t whole = p.channels - p.channels % LANES<A>, rest = p.channels - whole;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / segments, segment = task % segments;
    const T* grad = p.grad + b * p.channels;
    T* grad_x = p.grad_x + b * p.tokens * p.channels;
    if (segment == 0) std::memset(static_cast<void*>(grad_x), 0, size_t(p.prefix * p.channels) * sizeof(T));
    for (int64_t n = p.first_token(segment); n < p.last_token(segment); ++n) {
      const A weight = p.weight ? p.weight[b * p.tokens + n] : A(1);
      const Vector<A> normalized_weight = broadcast(p.known_total[b] == 0 ? A(0) : weight / p.known_total[b]);
      T* row = grad_x + n * p.channels;
      for (int64_t d = 0; d < whole; d += LANES<A>) store(row + d, normalized_weight * load(grad + d));
      if (rest) store(row + whole, normalized_weight * load(grad + whole, rest), rest);
    }
  }
}

// <g, x>, with four running sums so that one addition need not wait for the last. FINITE_ONLY: what is not finite in
// x counts as 0.
template <bool FINITE_ONLY, typename T, typename A = Accumulate<T>>
static A product(const T* g, const T* x, int64_t channels) {
  Vector<A> running[4] = {};
  const int64_t whole = channels - channels % (4 * LANES<A>);
  for (int64_t d = 0; d < whole; d += 4 * LANES<A>) {
    for (int k = 0; k < 4; ++k) {
      const Vector<A> value = load(x + d + k * LANES<A>);
      running[k] += load(g + d + k * LANES<A>) * (FINITE_ONLY ? keep_finite<A>(value) : value);
    }
  }
  for (int64_t d = whole; d < channels; d += LANES<A>) {
    const int64_t count = channels - d < LANES<A> ? channels - d : LANES<A>;
    const Vector<A> value = load(x + d, count);
    running[0] += load(g + d, count) * (FINITE_ONLY ? keep_finite<A>(value) : value);
  }
  return sum<A>((running[0] + running[1]) + (running[2] + running[3]));
}

template <typename T, typename A = Accumulate<T>>
static void weighted_mean_products(const WeightedMean<T>& p, int64_t begin, int64_t end) {
  const int64_t segments = p.segments();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / segments, segment = task % segments;
    const T* grad = p.grad + b * p.channels;
    for (int64_t n = p.first_token(segment); n < p.last_token(segment); ++n) {
      const T* row = p.x + b * p.stride_batch + n * p.stride_token;
      const bool unused = p.weight[b * p.tokens + n] == 0;
      p.grad_weight[b * p.tokens + n] =
          unused ? product<true, T>(grad, row, p.channels) : product<false, T>(grad, row, p.channels);
    }
  }
}

template <typename T, typename A = Accumulate<T>>
static void weighted_mean_centre(const WeightedMean<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const A* weight = p.weight + b * p.tokens;
    A* product = p.grad_weight + b * p.tokens;
    const double total = double(p.known_total[b]);
    double along_mean = 0;  // <g, y> = sum of w <g, x> / W
    for (int64_t n = p.prefix; n < p.tokens; ++n) along_mean += double(weight[n]) * double(product[n]);
    along_mean /= total;
    for (int64_t n = 0; n < p.prefix; ++n) product[n] = 0;
    for (int64_t n = p.prefix; n < p.tokens; ++n) {
      product[n] = total == 0 ? A(0) : A((double(product[n]) - along_mean) / total);
    }
  }
}

#else

MLIP_DEFINE_DISPATCH(weighted_mean_sums, WeightedMean)
MLIP_DEFINE_DISPATCH(weighted_mean_finish, WeightedMean)
MLIP_DEFINE_DISPATCH(weighted_mean_backward, WeightedMean)
MLIP_DEFINE_DISPATCH(weighted_mean_products, WeightedMean)
MLIP_DEFINE_DISPATCH(weighted_mean_centre, WeightedMean)

#endif  // MLIP_VECTOR_BYTES
