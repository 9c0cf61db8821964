// Compiled once per instruction set (cpu/simd.h); see cpu/contrastive/token_maxima_backward.h.

// The terms of one b with the others first <= c < last, by destination: those of n end at ends[n + 1] and begin where
// those of n - 1 end. I and J are the integers of the maps.
template <typename I, typename J, typename T, typename A = Accumulate<T>>
static void list_terms_as(const TokenMaximaBackward<T>& p, int64_t b, int64_t first, int64_t last, Term<A>* terms,
                          int32_t* ends) {
  const int64_t n = p.count, m = p.other_count;
  const bool* mask = p.mask ? p.mask + b * n : nullptr;
  const A* share = p.share + b * n;
  const auto best_other = [&](int64_t c) {
    return static_cast<const I*>(p.best_other.values) + b * p.best_other.stride_b + c * p.best_other.stride_c;
  };
  const auto best = [&](int64_t c) {
    return static_cast<const J*>(p.best.values) + b * p.best.stride_b + c * p.best.stride_c;
  };
  // Whether a map leads to a real token. What no forward pass has written may lead anywhere.
  const auto real = [](const bool* real, int64_t token, int64_t count) {
    return uint64_t(token) < uint64_t(count) && (real == nullptr || real[token]);
  };

  for (int64_t i = 0; i <= n; ++i) ends[i] = 0;
  int32_t* counts = ends + 1;
  for (int64_t c = first; c < last; ++c) {
    const bool* other_mask = p.other_mask ? p.other_mask + c * m : nullptr;
    const I* to = best_other(c);
    const J* from = best(c);
    if (mask == nullptr && other_mask == nullptr) {
      for (int64_t i = 0; i < n; ++i) counts[i] += int64_t(to[i]) < m && int64_t(to[i]) >= 0;
      for (int64_t k = 0; k < m; ++k) {
        if (real(nullptr, from[k], n)) ++counts[from[k]];
      }
      continue;
    }
    for (int64_t i = 0; i < n; ++i) counts[i] += (mask == nullptr || mask[i]) && real(other_mask, to[i], m);
    for (int64_t k = 0; k < m; ++k) {
      if ((other_mask == nullptr || other_mask[k]) && real(mask, from[k], n)) ++counts[from[k]];
    }
  }
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) {  // from counts to where the terms of a destination begin
    const int32_t count = counts[i];
    counts[i] = total;
    total += count;
  }
  for (int64_t c = first; c < last; ++c) {
    const bool* other_mask = p.other_mask ? p.other_mask + c * m : nullptr;
    const I* to = best_other(c);
    const J* from = best(c);
    const A* other_share = p.other_share + c * m;
    const A own = p.grad_mean[b * p.other_batch + c], won = p.grad_other_mean[c * p.batch + b];
    const int32_t row = int32_t((c - first) * m);
    for (int64_t i = 0; i < n; ++i) {
      if ((mask == nullptr || mask[i]) && real(other_mask, to[i], m)) {
        terms[counts[i]++] = {own * share[i], row + int32_t(to[i])};
      }
    }
    for (int64_t k = 0; k < m; ++k) {
      if ((other_mask == nullptr || other_mask[k]) && real(mask, from[k], n)) {
        terms[counts[from[k]]++] = {won * other_share[k], row + int32_t(k)};
      }
    }
  }
}

template <typename I, typename T, typename A = Accumulate<T>>
static void list_terms_to(const TokenMaximaBackward<T>& p, int64_t b, int64_t first, int64_t last, Term<A>* terms,
                          int32_t* ends) {
  if (p.best.bytes == 1) return list_terms_as<I, uint8_t>(p, b, first, last, terms, ends);
  if (p.best.bytes == 2) return list_terms_as<I, int16_t>(p, b, first, last, terms, ends);
  list_terms_as<I, int32_t>(p, b, first, last, terms, ends);
}

template <typename T, typename A = Accumulate<T>>
static void list_terms(const TokenMaximaBackward<T>& p, int64_t b, int64_t first, int64_t last, Term<A>* terms,
                       int32_t* ends) {
  if (p.best_other.bytes == 1) return list_terms_to<uint8_t>(p, b, first, last, terms, ends);
  if (p.best_other.bytes == 2) return list_terms_to<int16_t>(p, b, first, last, terms, ends);
  list_terms_to<int32_t>(p, b, first, last, terms, ends);
}

// sums += coefficient times token for all terms, V vectors of channels; sums begin at 0 where `fresh`.
template <int V, typename T, typename A = Accumulate<T>>
static inline void add_terms(const Term<A>* begin, const Term<A>* end, const T* tokens, int64_t channels, bool fresh,
                             A* sums) {
  Vector<A> sum[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = fresh ? Vector<A>{} : load(sums + v * LANES<A>);
  for (const Term<A>* term = begin; term != end; ++term) {
    const Vector<A> coefficient = broadcast(term->coefficient);
    const T* token = tokens + int64_t(term->row) * channels;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] += coefficient * load(token + v * LANES<A>);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(sums + v * LANES<A>, sum[v]);
}

// The same for channels first <= d < last.
template <typename T, typename A = Accumulate<T>>
static void add_slice(const Term<A>* begin, const Term<A>* end, const T* tokens, int64_t channels, int64_t first,
                      int64_t last, bool fresh, A* sums) {
  constexpr int L = LANES<A>;
  int64_t d = first;
  for (; d + 8 * L <= last; d += 8 * L) add_terms<8>(begin, end, tokens + d, channels, fresh, sums + d);
  for (; d + L <= last; d += L) add_terms<1>(begin, end, tokens + d, channels, fresh, sums + d);
  if (const int64_t rest = last - d) {
    Vector<A> sum = fresh ? Vector<A>{} : load(sums + d, rest);
    for (const Term<A>* term = begin; term != end; ++term) {
      sum += broadcast(term->coefficient) * load(tokens + d + int64_t(term->row) * channels, rest);
    }
    store(sums + d, sum, rest);
  }
}

// `members` of b, from the first on, and channels first <= d < last.
template <typename T, typename A = Accumulate<T>>
static void add_members(const TokenMaximaBackward<T>& p, const BackwardCut<T>& cut, int64_t b, int64_t members,
                        int64_t first, int64_t last) {
  const int64_t n = p.count, terms = cut.others * (p.count + p.other_count);
  A* sums = cut.sums;
  if constexpr (sizeof(T) == sizeof(A)) sums = p.grad + b * n * p.channels;
  for (int64_t c = 0; c < p.other_batch || c == 0; c += cut.others) {
    const int64_t end = c + cut.others < p.other_batch ? c + cut.others : p.other_batch;
    for (int64_t i = 0; i < members; ++i) {
      list_terms(p, b + i, c, end, cut.terms + i * terms, cut.ends + i * (n + 1));
    }
    const T* tokens = p.others + c * p.other_count * p.channels;
    for (int64_t d = first; d < last; d += p.SLICE) {
      const int64_t slice_end = d + p.SLICE < last ? d + p.SLICE : last;
      for (int64_t row = 0; row < members * n; ++row) {
        const Term<A>* of_member = cut.terms + row / n * terms;
        const int32_t* ends = cut.ends + row / n * (n + 1) + row % n;
        add_slice(of_member + ends[0], of_member + ends[1], tokens, p.channels, d, slice_end, c == 0,
                  sums + row * p.channels);
      }
    }
  }
  if constexpr (sizeof(T) != sizeof(A)) {
    for (int64_t row = 0; row < members * n; ++row) {
      T* grad = p.grad + (b * n + row) * p.channels;
      const A* sum = sums + row * p.channels;
      int64_t d = first;
      for (; d + LANES<A> <= last; d += LANES<A>) store(grad + d, load(sum + d));
      if (d < last) store(grad + d, load(sum + d, last - d), last - d);
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
