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

// The terms of one b with the others first <= c < last, in one list per destination: one for every c, that of its best,
// then those of the tokens that it is best for. Two tokens that are each other's best make one term, of the first kind.
//
// Which tokens these are is as good as random, so nothing branches on it: what is no term is listed, too, and the next
// one takes its place. That is why every list has room for one more.
template <bool MASKED, typename T, typename A = Accumulate<T>>
static void list_terms(const TokenMaximaBackward<T>& p, const BackwardCut<T>& cut, int64_t b, int64_t first,
                       int64_t last, Term<A>* terms, TermRange* ranges) {
  const int32_t n = int32_t(p.count), m = int32_t(p.other_count);
  const A* share = p.share + b * n;
  const auto real = [&](const Flag* mask, int64_t of, int32_t count, int32_t token) {
    return int32_t(!MASKED || mask == nullptr || mask[of * count + token]);
  };
  int32_t* next = cut.next;
  const int32_t others = int32_t(last - first);
  for (int32_t i = 0; i < n; ++i) next[i] = 0;
  for (int64_t c = first; c < last; ++c) {
    int32_t *best_other = cut.places + (c - first) * (n + m), *best = best_other + n;
    read_map(p.best_other, b, c, n, m, best_other);
    read_map(p.best, b, c, m, n, best);
    for (int32_t k = 0; k < m; ++k) {
      const int32_t i = best[k];
      next[i] += int32_t(best_other[i] != k) & real(p.other_mask, c, m, k) & real(p.mask, b, n, i);
    }
  }
  int32_t total = 0;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t count = next[i];
    ranges[i] = {total, total + others + count};
    if (MASKED && !real(p.mask, b, n, i)) ranges[i].end = total;
    next[i] = total + others;
    total += others + count + 1;
  }

  const int32_t none = int32_t(cut.others * m);  // a row of zeros
  A* back = cut.back;
  back[m] = 0;
  for (int64_t c = first; c < last; ++c) {
    int32_t *best_other = cut.places + (c - first) * (n + m), *best = best_other + n;
    const A own = p.grad_mean[b * p.other_batch + c], other = p.grad_other_mean[c * p.batch + b];
    const A* other_share = p.other_share + c * m;
    const int32_t row = int32_t((c - first) * m);
    for (int32_t k = 0; k < m; ++k) back[k] = other * other_share[k];
    for (int32_t k = 0; k < m; ++k) {
      const int32_t i = best[k], apart = best_other[i] != k;
      terms[next[i]] = {back[k], row + k};
      next[i] += apart & real(p.other_mask, c, m, k) & real(p.mask, b, n, i);
    }
    Term<A>* to = terms + (c - first);
    for (int32_t i = 0; i < n; ++i) {
      const int32_t k = best_other[i], mutual = best[k] == i;
      const A coefficient = own * share[i] + back[m + (k - m) * mutual];
      to[ranges[i].begin] = real(p.other_mask, c, m, k) ? Term<A>{coefficient, row + k} : Term<A>{0, none};
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
#if MLIP_VECTOR_BYTES > 16
  asm("" : "+v"(bits));  // or each of the two instructions would read memory, which bounds the time
#endif
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

// Sums that do not wait for each other: as many as the registers hold.
constexpr int CHAINS = MLIP_VECTOR_BYTES == 64 ? 2 : 1;
constexpr int64_t RUN = 32 * CHAINS;  // terms added up at a time: sums of sums round less than long ones

// sum += coefficient times token, P pairs of vectors.
template <int P, typename T, typename A = Accumulate<T>>
static inline __attribute__((always_inline)) void add_term(const Term<A>& term, const T* tokens, Vector<A>* sum) {
  const Vector<A> coefficient = broadcast(term.coefficient);
  const T* token = tokens + term.row * TokenMaximaBackward<T>::SLICE;
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) {
    Vector<A> pair[2];
    load_pair(token + 2 * i * LANES<A>, pair);
    sum[2 * i] += coefficient * pair[0];
    sum[2 * i + 1] += coefficient * pair[1];
  }
}

// total += the terms of a list.
template <int P, typename T, typename A = Accumulate<T>>
static inline __attribute__((always_inline)) void add_terms(const Term<A>* begin, const Term<A>* end, const T* tokens,
                                                            Vector<A>* total) {
  while (begin < end) {
    const Term<A>* run_end = end - begin > RUN ? begin + RUN : end;
    Vector<A> sums[CHAINS][2 * P] = {};
    for (; begin + CHAINS <= run_end; begin += CHAINS) {
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; ++chain) add_term<P>(begin[chain], tokens, sums[chain]);
    }
    for (; begin < run_end; ++begin) add_term<P>(*begin, tokens, sums[0]);
#pragma GCC unroll 16
    for (int v = 0; v < 2 * P; ++v) {
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; ++chain) total[v] += sums[chain][v];
    }
  }
}

// What a block adds to P pairs of vectors of one destination.
template <typename T, typename A = Accumulate<T>>
struct Destination {
  const Term<A>*begin, *end;
  A* sums;
  T* grad;
  bool is_first, is_last;  // block
};

// The sums of a destination begin with the first block, and the last one turns them into the gradient: P pairs of
// vectors from channel d of the slice on, of which `width` channels are there to be written.
template <int P, typename T, typename A = Accumulate<T>>
static inline void add_block(const Destination<T>& to, const T* tokens, int64_t d, int64_t width) {
  constexpr int64_t PAIR = 2 * LANES<A>;
  Vector<A> total[2 * P] = {};
  add_terms<P>(to.begin, to.end, tokens + d, total);
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i, d += PAIR) {
    Vector<A>* pair = total + 2 * i;
    if (!to.is_first) pair[0] += load(to.sums + d), pair[1] += load(to.sums + d + LANES<A>);
    if (!to.is_last) {
      store(to.sums + d, pair[0]), store(to.sums + d + LANES<A>, pair[1]);
    } else if (d + PAIR <= width) {
      store_pair(to.grad + d, pair);
    } else {
      T padded[PAIR];
      store_pair(padded, pair);
      std::memcpy(static_cast<void*>(to.grad + d), padded, size_t(width - d) * sizeof(T));
    }
  }
}

// Channels first <= d < last of `rows` tokens, SLICE apart, with zeros up to `padded` channels.
template <typename T>
static void gather_slice(const T* tokens, int64_t channels, int64_t rows, int64_t first, int64_t last, int64_t padded,
                         T* slice) {
  constexpr int64_t AHEAD = 16, LINE = 64 / sizeof(T);  // of what lies `channels` apart, processors fetch little ahead
  const int64_t width = last - first;
  for (int64_t row = 0; row < rows; ++row) {
    T* to = slice + row * TokenMaximaBackward<T>::SLICE;
    const T* ahead = tokens + (row + AHEAD < rows ? row + AHEAD : rows - 1) * channels + first;
    for (int64_t d = 0; d < width; d += LINE) __builtin_prefetch(ahead + d);
    std::memcpy(static_cast<void*>(to), tokens + row * channels + first, size_t(width) * sizeof(T));
    if (width < padded) std::memset(static_cast<void*>(to + width), 0, size_t(padded - width) * sizeof(T));
  }
}

// `members` of b, from b on, and channels first <= d < last, where first is a multiple of SLICE.
template <typename T, typename A = Accumulate<T>>
static void add_members(const TokenMaximaBackward<T>& p, const BackwardCut<T>& cut, int64_t b, int64_t members,
                        int64_t first, int64_t last) {
  constexpr int64_t PAIR = 2 * LANES<A>, SLICE = p.SLICE, P = 4;
  const int64_t n = p.count, m = p.other_count;
  for (int64_t c = 0; c == 0 || c < p.other_batch; c += cut.others) {  // once even if there are no others
    const int64_t end = c + cut.others < p.other_batch ? c + cut.others : p.other_batch;
    for (int64_t i = 0; i < members; ++i) {
      const auto list = p.mask || p.other_mask ? list_terms<true, T> : list_terms<false, T>;
      list(p, cut, b + i, c, end, cut.terms + i * cut.terms_of_member, cut.ranges + i * n);
    }
    for (int64_t d = first; d < last; d += SLICE) {
      const int64_t width = last - d < SLICE ? last - d : SLICE, padded = (width + PAIR - 1) / PAIR * PAIR;
      gather_slice(p.others + c * m * p.channels, p.channels, (end - c) * m, d, d + width, padded, cut.slice);
      for (int64_t row = 0; row < members * n; ++row) {
        const Term<A>* terms = cut.terms + row / n * cut.terms_of_member;
        const Destination<T> to = {terms + cut.ranges[row].begin,
                                   terms + cut.ranges[row].end,
                                   cut.sums + (d - first) * members * n + row * SLICE,
                                   p.grad + (b * n + row) * p.channels + d,
                                   c == 0,
                                   end == p.other_batch};
        int64_t k = 0;
        for (; k + P * PAIR <= padded; k += P * PAIR) add_block<P>(to, cut.slice, k, width);
        for (; k < padded; k += PAIR) add_block<1>(to, cut.slice, k, width);
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
