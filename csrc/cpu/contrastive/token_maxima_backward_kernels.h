// Compiled once per instruction set (cpu/simd.h); see cpu/contrastive/token_maxima_backward.h.

// A row of a map, `count` places in [0, most): what no forward pass has written must not lead outside of the tensors.
template <typename I>
static void read_map_as(const I* from, int64_t count, int64_t most, int32_t* to) {
  const uint32_t last = uint32_t(most - 1);
  for (int64_t i = 0; i < count; ++i) to[i] = int32_t(uint32_t(from[i]) < last ? uint32_t(from[i]) : last);
}

static void read_map(const TokenMap& map, int64_t b, int64_t c, int64_t count, int64_t most, int32_t* to) {
  const int64_t from = b * map.stride_b + c * map.stride_c;
  if (map.bytes == 1) {
    read_map_as(static_cast<const uint8_t*>(map.values) + from, count, most, to);
  } else if (map.bytes == 2) {
    read_map_as(static_cast<const int16_t*>(map.values) + from, count, most, to);
  } else {
    read_map_as(static_cast<const int32_t*>(map.values) + from, count, most, to);
  }
}

// The terms of one b with the others first <= c < last, by destination: those of n end at ends[n + 1] and begin where
// those of n - 1 end. `places` has room for the N + M places of a pair.
template <bool MASKED, typename T, typename A = Accumulate<T>>
static void list_terms(const TokenMaximaBackward<T>& p, int64_t b, int64_t first, int64_t last, Term<A>* terms,
                       int32_t* ends, int32_t* places) {
  const int64_t n = p.count, m = p.other_count;
  const bool* mask = p.mask ? p.mask + b * n : nullptr;
  const A* share = p.share + b * n;
  int32_t *best_other = places, *best = places + n, *counts = ends + 1;
  const auto real = [&](const bool* of, int64_t token) { return !MASKED || of == nullptr || of[token]; };

  for (int64_t i = 0; i <= n; ++i) ends[i] = 0;
  for (int64_t c = first; c < last; ++c) {
    const bool* other_mask = p.other_mask ? p.other_mask + c * m : nullptr;
    if (MASKED) read_map(p.best_other, b, c, n, m, best_other);
    read_map(p.best, b, c, m, n, best);
    for (int64_t i = 0; i < n; ++i) counts[i] += !MASKED || (real(mask, i) && real(other_mask, best_other[i]));
    for (int64_t k = 0; k < m; ++k) counts[best[k]] += real(other_mask, k) && real(mask, best[k]);
  }
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) {  // from counts to where the terms of a destination begin
    const int32_t count = counts[i];
    counts[i] = total;
    total += count;
  }
  for (int64_t c = first; c < last; ++c) {
    const bool* other_mask = p.other_mask ? p.other_mask + c * m : nullptr;
    const A* other_share = p.other_share + c * m;
    const A own = p.grad_mean[b * p.other_batch + c], won = p.grad_other_mean[c * p.batch + b];
    const int32_t row = int32_t((c - first) * m);
    read_map(p.best_other, b, c, n, m, best_other);
    read_map(p.best, b, c, m, n, best);
    for (int64_t i = 0; i < n; ++i) {
      if (real(mask, i) && real(other_mask, best_other[i])) {
        terms[counts[i]++] = {own * share[i], row + best_other[i]};
      }
    }
    for (int64_t k = 0; k < m; ++k) {
      if (real(other_mask, k) && real(mask, best[k]))
        terms[counts[best[k]]++] = {won * other_share[k], row + int32_t(k)};
    }
  }
}

// Two vectors of consecutive channels: of bfloat16 the even ones and the odd ones, which takes two instructions; of
// other types the first half and the second. Sums keep that order until they are stored.
template <typename T>
static inline __attribute__((always_inline)) void load_pair(const T* from, Vector<Accumulate<T>>* pair) {
  pair[0] = load(from);
  pair[1] = load(from + LANES<Accumulate<T>>);
}

template <typename T>
static inline __attribute__((always_inline)) void store_pair(T* to, const Vector<Accumulate<T>>* pair) {
  store(to, pair[0]);
  store(to + LANES<Accumulate<T>>, pair[1]);
}

static inline __attribute__((always_inline)) void load_pair(const BFloat16* from, Vector<float>* pair) {
  Bits32 bits;
  std::memcpy(&bits, from, sizeof bits);
  pair[0] = (Vector<float>)(bits << 16);
  pair[1] = (Vector<float>)(bits & 0xffff0000u);
}

static inline __attribute__((always_inline)) void store_pair(BFloat16* to, const Vector<float>* pair) {
  Bits32 nearest[2];
  for (int i = 0; i < 2; ++i) {
    const Bits32 bits = (Bits32)pair[i];
    nearest[i] = pair[i] == pair[i] ? bits + 0x7fff + ((bits >> 16) & 1) : Bits32{} + 0x7fc00000u;
  }
  const Bits32 both = (nearest[0] >> 16) | (nearest[1] & 0xffff0000u);
  std::memcpy(to, &both, sizeof both);
}

constexpr int64_t RUN = 32;  // terms added up before they reach the running sum: sums of sums round less than long ones

// sums += coefficient times token for all terms, P pairs of vectors. Tokens lie `stride` apart.
template <int P, typename T, typename A = Accumulate<T>>
static inline void add_terms(const Term<A>* begin, const Term<A>* end, const T* tokens, int64_t stride, A* sums) {
  while (begin != end) {
    const Term<A>* run_end = end - begin > RUN ? begin + RUN : end;
    Vector<A> sum[2 * P];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) sum[v] = Vector<A>{};
    for (; begin != run_end; ++begin) {
      const Vector<A> coefficient = broadcast(begin->coefficient);
      const T* token = tokens + begin->row * stride;
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) {
        Vector<A> pair[2];
        load_pair(token + 2 * i * LANES<A>, pair);
        sum[2 * i] += coefficient * pair[0];
        sum[2 * i + 1] += coefficient * pair[1];
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) store(sums + v * LANES<A>, load(sums + v * LANES<A>) + sum[v]);
  }
}

// Channels first <= d < last of `rows` tokens side by side, with zeros up to `stride` channels.
template <typename T>
static void gather_slice(const T* tokens, int64_t channels, int64_t rows, int64_t first, int64_t last, int64_t stride,
                         T* slice) {
  const int64_t width = last - first;
  for (int64_t row = 0; row < rows; ++row) {
    T* to = slice + row * stride;
    std::memcpy(static_cast<void*>(to), tokens + row * channels + first, size_t(width) * sizeof(T));
    if (width < stride) std::memset(static_cast<void*>(to + width), 0, size_t(stride - width) * sizeof(T));
  }
}

// `members` of b, from b on, and channels first <= d < last, where first is a multiple of SLICE.
template <typename T, typename A = Accumulate<T>>
static void add_members(const TokenMaximaBackward<T>& p, const BackwardCut<T>& cut, int64_t b, int64_t members,
                        int64_t first, int64_t last) {
  constexpr int64_t PAIR = 2 * LANES<A>, SLICE = p.SLICE;
  const int64_t n = p.count, m = p.other_count, terms = cut.others * (n + m);
  const int64_t channels = (last - first + PAIR - 1) / PAIR * PAIR;  // those of the sums
  std::memset(cut.sums, 0, size_t(members * n * channels) * sizeof(A));
  for (int64_t c = 0; c < p.other_batch; c += cut.others) {
    const int64_t end = c + cut.others < p.other_batch ? c + cut.others : p.other_batch;
    for (int64_t i = 0; i < members; ++i) {
      const auto list = p.mask || p.other_mask ? list_terms<true, T> : list_terms<false, T>;
      list(p, b + i, c, end, cut.terms + i * terms, cut.ends + i * (n + 1), cut.places);
    }
    for (int64_t d = 0; d < channels; d += SLICE) {
      const int64_t stride = channels - d < SLICE ? channels - d : SLICE;
      const int64_t slice_end = first + d + stride < last ? first + d + stride : last;
      gather_slice(p.others + c * m * p.channels, p.channels, (end - c) * m, first + d, slice_end, stride, cut.slice);
      for (int64_t row = 0; row < members * n; ++row) {
        const int32_t* ends = cut.ends + row / n * (n + 1) + row % n;
        const Term<A>* of_member = cut.terms + row / n * terms;
        const Term<A>*from = of_member + ends[0], *to = of_member + ends[1];
        A* sums = cut.sums + d * members * n + row * stride;
        int64_t k = 0;
        for (; k + 4 * PAIR <= stride; k += 4 * PAIR) add_terms<4>(from, to, cut.slice + k, stride, sums + k);
        for (; k < stride; k += PAIR) add_terms<1>(from, to, cut.slice + k, stride, sums + k);
      }
    }
  }

  for (int64_t row = 0; row < members * n; ++row) {
    T* grad = p.grad + (b * n + row) * p.channels + first;
    for (int64_t d = 0; d < channels; d += PAIR) {
      const int64_t slice = d / SLICE * SLICE, stride = channels - slice < SLICE ? channels - slice : SLICE;
      const A* sums = cut.sums + slice * members * n + row * stride + d - slice;
      const Vector<A> pair[2] = {load(sums), load(sums + LANES<A>)};
      if (d + PAIR <= last - first) {
        store_pair(grad + d, pair);
      } else {
        T padded[PAIR];
        store_pair(padded, pair);
        std::memcpy(static_cast<void*>(grad + d), padded, size_t(last - first - d) * sizeof(T));
      }
    }
  }
}

template <typename T>
static void backward(const TokenMaximaBackward<T>& p, const BackwardCut<T>& cut, int64_t begin, int64_t end) {
  const int64_t slices = p.slices();
  while (begin < end) {
    const int64_t b = begin / slices, slice = begin % slices, whole = (end - begin) / slices;
    if (slice == 0 && whole > 0) {
      const int64_t members = whole < cut.members ? whole : cut.members;
      add_members(p, cut, b, members, 0, p.channels);
      begin += members * slices;
    } else {
      const int64_t until = end - begin < slices - slice ? slice + end - begin : slices;
      const int64_t last = until * p.SLICE < p.channels ? until * p.SLICE : p.channels;
      add_members(p, cut, b, 1, slice * p.SLICE, last);
      begin += until - slice;
    }
  }
}
