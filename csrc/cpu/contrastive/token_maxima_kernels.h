// Compiled once per instruction set (cpu/simd.h). What each function does is said in cpu/contrastive/token_maxima.h.

#include "cpu/contrastive/operands_kernels.h"
#include "cpu/contrastive/reductions_kernels.h"

// Working memory of one thread, cut into arrays that start on cache lines.
struct Arena {
  char* next;
  template <typename E>
  E* take(int64_t count) {
    E* taken = reinterpret_cast<E*>(next);
    next += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
    return taken;
  }
};

template <typename T>
static int64_t steps_of(int64_t channels) {
  return (channels + Operand<T>::CHANNELS - 1) / Operand<T>::CHANNELS;
}

static inline int64_t real_of(const TokenPlaces& places, int64_t i) { return places.first[i + 1] - places.first[i]; }

template <typename T>
static void pack_texts(const TokenMaxima<T>& p, const TokenPlaces& texts, const TokenGroup* groups, void* packed,
                       void* share_, void* room_, int64_t begin, int64_t end) {
  constexpr int64_t L = LANES<Accumulate<T>>;
  const int64_t steps = steps_of<T>(p.channels);
  auto* room = static_cast<Element<T>*>(room_);
  auto* share = static_cast<Accumulate<T>*>(share_);
  for (int64_t g = begin; g < end; ++g) {
    auto* strips = static_cast<Element<T>*>(packed) + groups[g].start * steps;
    int64_t column = 0;
    for (int64_t c = groups[g].first; c < groups[g].last; ++c) {
      const T* text = p.texts.values + c * p.texts.stride_batch;
      for (int64_t k = texts.first[c]; k < texts.first[c + 1]; ++k, ++column) {
        const T* token = text + texts.place[k] * p.texts.stride_token;
        pack_token(token, p.channels, L, strips + column / L * L * steps + column % L, room);
        share[groups[g].start + column] = p.texts.share[c * p.texts.count + texts.place[k]];
      }
    }
    for (; column < groups[g].length; ++column) {
      for (int64_t k = 0; k < steps; ++k) strips[column / L * L * steps + k * L + column % L] = 0;
    }
  }
}

template <typename T>
static void pack_rows(const TokenMaxima<T>& p, const TokenPlaces& images, const TokenGroup& group, Element<T>* packed,
                      Accumulate<T>* share, Element<T>* room) {
  const int64_t steps = steps_of<T>(p.channels);
  const RowTiles tiles(group.length);
  int64_t row = 0, tile = 0;
  for (int64_t b = group.first; b < group.last; ++b) {
    const T* image = p.images.values + b * p.images.stride_batch;
    for (int64_t k = images.first[b]; k < images.first[b + 1]; ++k, ++row) {
      if (row == tiles.begin(tile + 1)) ++tile;
      const int64_t begin = tiles.begin(tile), height = tiles.begin(tile + 1) - begin;
      const T* token = image + images.place[k] * p.images.stride_token;
      pack_token(token, p.channels, height, packed + begin * steps + row - begin, room);
      share[row] = p.images.share[b * p.images.count + images.place[k]];
    }
  }
}

// Places ascend, so the last tells whether they count 0, 1, 2, ...
static inline bool leading(const int32_t* place, int64_t real) { return real == 0 || place[real - 1] == real - 1; }

// The places of winners, one for each real token of a side; other tokens get 0.
template <typename I, typename N>
static void write_best_as(I* to, int64_t count, const int32_t* place, const int32_t* winner_place, bool as_they_are,
                          const N* winner, int64_t real) {
  if (real < count) std::memset(to, 0, size_t(count) * sizeof(I));
  if (as_they_are) {
    for (int64_t k = 0; k < real; ++k) to[k] = I(winner[k]);
  } else {
    for (int64_t k = 0; k < real; ++k) to[place[k]] = I(winner_place[winner[k]]);
  }
}

template <typename N>
static void write_best(void* map, int bytes, int64_t from, int64_t count, const int32_t* place,
                       const int32_t* winner_place, bool as_they_are, const N* winner, int64_t real) {
  if (map == nullptr) return;
  if (bytes == 1) {
    write_best_as(static_cast<uint8_t*>(map) + from, count, place, winner_place, as_they_are, winner, real);
  } else if (bytes == 2) {
    write_best_as(static_cast<int16_t*>(map) + from, count, place, winner_place, as_they_are, winner, real);
  } else {
    write_best_as(static_cast<int32_t*>(map) + from, count, place, winner_place, as_they_are, winner, real);
  }
}

template <typename A>
static void write_maxima(A* to, int64_t from, int64_t count, const int32_t* place, const A* maxima, int64_t real) {
  if (to == nullptr) return;
  if (real < count) std::memset(to + from, 0, size_t(count) * sizeof(A));
  for (int64_t k = 0; k < real; ++k) to[from + place[k]] = maxima[k];
}

// The sum of share times maximum over the first `real` tokens. What follows them is read, but not used.
template <typename A>
MLIP_FORCED A mean(const A* share, const A* maxima, int64_t real) {
  Vector<A> total = {};
  int64_t k = 0;
  for (; k + LANES<A> <= real; k += LANES<A>) total += load(share + k) * load(maxima + k);
  const Vector<A> last = load(share + k) * load(maxima + k);
  return sum<A>(total + (lane_numbers<A>() < Integer<A>(real - k) ? last : Vector<A>{}));
}

// Whether all similarities are finite in the strips that columns first <= c < last touch, by the sums of what
// `reduce_columns` multiplied by 0. The whole strips: `reduce_rows` adds -inf to the columns of neighbours.
template <typename A>
MLIP_FORCED bool all_finite(const A* zeros, int64_t first, int64_t last) {
  Vector<A> total = {};
  for (int64_t k = first / LANES<A> * LANES<A>; k < last; k += LANES<A>) total += load(zeros + k);
  return sum<A>(total) == 0;
}

// What the real tokens of one side found on the other.
template <typename A>
struct Found {
  const A *share, *maxima;
  const Integer<A>* best;
};

// The results of image b and text c.
template <typename T, typename A = Accumulate<T>>
static void write_pair(const TokenMaxima<T>& p, const TokenMaximaCut& cut, int64_t b, int64_t c, Found<A> by_image,
                       Found<A> by_text) {
  const int64_t n = p.images.count, m = p.texts.count, pair = b * p.texts.batch + c;
  const int32_t* image_place = cut.images.place + cut.images.first[b];
  const int32_t* text_place = cut.texts.place + cut.texts.first[c];
  int64_t rows = real_of(cut.images, b), columns = real_of(cut.texts, c);
  if (rows == 0 || columns == 0) rows = columns = 0;  // nothing to be found on one side: zeros on both
  p.per_image[pair] = mean(by_image.share, by_image.maxima, rows);
  p.per_text[c * p.images.batch + b] = mean(by_text.share, by_text.maxima, columns);
  const bool plain = leading(image_place, rows) && leading(text_place, columns);
  write_best(p.best_text, p.best_text_bytes, pair * n, n, image_place, text_place, plain, by_image.best, rows);
  write_best(p.best_image, p.best_image_bytes, pair * m, m, text_place, image_place, plain, by_text.best, columns);
  write_maxima(p.text_maxima, pair * n, n, image_place, by_image.maxima, rows);
  write_maxima(p.image_maxima, pair * m, m, text_place, by_text.maxima, columns);
}

template <typename T>
static void maxima(const TokenMaxima<T>& p, const TokenMaximaCut& cut, const TokenMaximaBlock& block,
                   const void* packed, const void* share, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int64_t L = LANES<A>;
  constexpr auto SIZES = std::make_integer_sequence<int, TILE_ROWS>{};
  const int64_t steps = steps_of<T>(p.channels);
  Arena arena{static_cast<char*>(scratch)};
  auto* packed_rows = arena.take<Element<T>>(cut.most_rows * steps);
  auto* room = arena.take<Element<T>>(steps + L);
  A* tile = arena.take<A>((cut.most_rows + L) * cut.most_columns);
  A* column_maxima = arena.take<A>(cut.most_images * cut.most_columns + L);
  auto* best_rows = arena.take<Integer<A>>(cut.most_images * cut.most_columns + L);
  A* zeros = arena.take<A>(cut.most_images * cut.most_columns + L);
  A* row_share = arena.take<A>(cut.most_rows + L);
  A* row_maxima = arena.take<A>(cut.most_rows + L);
  auto* best_columns = arena.take<Integer<A>>(cut.most_rows + L);

  const A* column_share = static_cast<const A*>(share);
  const bool keep_best = p.best_text != nullptr;
  int64_t packed_group = -1;
  for (int64_t task = begin; task < end; ++task) {
    const TokenGroup& images = block.images[task / block.text_groups];
    const TokenGroup& texts = block.texts[task % block.text_groups];
    const int64_t rows = images.length, columns = texts.length, stride = rows * L;
    if (packed_group != task / block.text_groups) {
      packed_group = task / block.text_groups;
      pack_rows(p, cut.images, images, packed_rows, row_share, room);
    }

    const auto* strips = static_cast<const Element<T>*>(packed) + texts.start * steps;
    const RowTiles tiles(rows);
    for (int64_t column = 0; column < columns; column += TILE_STRIPS * L) {
      const bool pair_of_strips = columns - column > L;
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t row = tiles.begin(t), height = tiles.begin(t + 1) - row;
        const Element<T>* row_tile = packed_rows + row * steps;
        A* to = tile + column * rows + row * L;
        if (pair_of_strips) {
          similarities_of<T, 2>(height, SIZES, row_tile, strips + column * steps, steps, to, stride);
        } else {
          similarities_of<T, 1>(height, SIZES, row_tile, strips + column * steps, steps, to, stride);
        }
      }
      for (int64_t strip = column; strip < column + (pair_of_strips ? 2 : 1) * L; strip += L) {
        for (int64_t b = images.first; b < images.last; ++b) {
          const int64_t at = (b - images.first) * columns + strip;
          const int64_t row = cut.images.first[b] - images.start;
          reduce_columns(tile + strip * rows + row * L, real_of(cut.images, b), column_maxima + at, best_rows + at,
                         zeros + at);
        }
      }
    }

    for (int64_t c = texts.first; c < texts.last; ++c) {
      const int64_t first = cut.texts.first[c] - cut.texts.first[texts.first], last = first + real_of(cut.texts, c);
      if (rows > 0 && last > first) {
        reduce_rows(tile, stride, rows, first, last, row_maxima, keep_best ? best_columns : nullptr);
      }
      for (int64_t b = images.first; b < images.last; ++b) {
        const int64_t row = cut.images.first[b] - images.start, height = real_of(cut.images, b);
        const int64_t row_at = (b - images.first) * columns, at = row_at + first;
        if (height > 0 && last > first && !all_finite(zeros + row_at, first, last)) {
          reduce_any(tile + row * L, stride, height, first, last, row_maxima + row, best_columns + row,
                     column_maxima + at, best_rows + at);
        }
        write_pair(p, cut, b, c, Found<A>{row_share + row, row_maxima + row, best_columns + row},
                   Found<A>{column_share + texts.start + first, column_maxima + at, best_rows + at});
      }
    }
  }
}
