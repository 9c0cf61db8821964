// Forward pass of token logits. What it computes and how the work is split: cpu/contrastive/token_maxima.h.
#include "cpu/contrastive/token_maxima.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#define MLIP_BF16_VARIANT
#define MLIP_KERNELS "cpu/contrastive/token_maxima.cpp"  // this file, once per instruction set
#include "cpu/simd.h"

#ifdef MLIP_VECTOR_BYTES

#include "cpu/contrastive/similarity_tile_kernels.h"

template <typename T>
static void pack_texts(const TokenMaxima<T>& p, const ValidTokens& texts, const TokenGroup* groups, void* packed,
                       void* weight_, void* room_, int64_t begin, int64_t end) {
  constexpr int64_t L = LANES<Accumulate<T>>;
  const int64_t steps = steps_of<Element<T>>(p.channels);
  auto* room = static_cast<Element<T>*>(room_);
  auto* weight = static_cast<Accumulate<T>*>(weight_);
  for (int64_t g = begin; g < end; ++g) {
    auto* strips = static_cast<Element<T>*>(packed) + groups[g].start * steps;
    int64_t column = 0;
    for (int64_t c = groups[g].first; c < groups[g].last; ++c) {
      const T* text = p.texts.values + c * p.texts.stride_batch;
      for (int64_t k = texts.first[c]; k < texts.first[c + 1]; ++k, ++column) {
        const T* token = text + texts.index[k] * p.texts.stride_token;
        pack_token(token, p.channels, L, strips + column / L * L * steps + column % L, room);
        weight[groups[g].start + column] = p.texts.normalized_weight[c * p.texts.count + texts.index[k]];
      }
    }
    for (; column < groups[g].length; ++column) {
      for (int64_t k = 0; k < steps; ++k) strips[column / L * L * steps + k * L + column % L] = 0;
    }
  }
}

template <typename T>
static void pack_rows(const TokenMaxima<T>& p, const ValidTokens& images, const TokenGroup& group, Element<T>* packed,
                      Accumulate<T>* weight, Element<T>* room) {
  const int64_t steps = steps_of<Element<T>>(p.channels);
  const RowTiles tiles(group.length);
  int64_t row = 0, tile = 0;
  for (int64_t b = group.first; b < group.last; ++b) {
    const T* image = p.images.values + b * p.images.stride_batch;
    for (int64_t k = images.first[b]; k < images.first[b + 1]; ++k, ++row) {
      if (row == tiles.begin(tile + 1)) ++tile;
      const int64_t begin = tiles.begin(tile), height = tiles.begin(tile + 1) - begin;
      const T* token = image + images.index[k] * p.images.stride_token;
      pack_token(token, p.channels, height, packed + begin * steps + row - begin, room);
      weight[row] = p.images.normalized_weight[b * p.images.count + images.index[k]];
    }
  }
}

// Indices ascend, so the last tells whether they count 0, 1, 2, ...
static inline bool leading(const int32_t* index, int64_t valid) { return valid == 0 || index[valid - 1] == valid - 1; }

// The argmax of each valid token of a side, as an index on the other one; masked tokens get 0.
template <typename I, typename N>
static void write_argmax_as(I* to, int64_t count, const int32_t* index, const int32_t* other_index, bool as_they_are,
                            const N* argmax, int64_t valid) {
  if (valid < count) std::memset(to, 0, size_t(count) * sizeof(I));
  if (as_they_are) {
    for (int64_t k = 0; k < valid; ++k) to[k] = I(argmax[k]);
  } else {
    for (int64_t k = 0; k < valid; ++k) to[index[k]] = I(other_index[argmax[k]]);
  }
}

template <typename N>
static void write_argmax(void* to, int bytes, int64_t from, int64_t count, const int32_t* index,
                         const int32_t* other_index, bool as_they_are, const N* argmax, int64_t valid) {
  if (to == nullptr) return;
  if (bytes == 1) {
    write_argmax_as(static_cast<uint8_t*>(to) + from, count, index, other_index, as_they_are, argmax, valid);
  } else if (bytes == 2) {
    write_argmax_as(static_cast<int16_t*>(to) + from, count, index, other_index, as_they_are, argmax, valid);
  } else {
    write_argmax_as(static_cast<int32_t*>(to) + from, count, index, other_index, as_they_are, argmax, valid);
  }
}

template <typename A>
static void write_maxima(A* to, int64_t from, int64_t count, const int32_t* index, const A* maxima, int64_t valid) {
  if (to == nullptr) return;
  if (valid < count) std::memset(to + from, 0, size_t(count) * sizeof(A));
  for (int64_t k = 0; k < valid; ++k) to[from + index[k]] = maxima[k];
}

// The sum of weight times maximum over the first `valid` tokens. What follows them is read, but not used.
template <typename A>
MLIP_FORCED A mean(const A* weight, const A* maxima, int64_t valid) {
  Vector<A> total = {};
  int64_t k = 0;
  for (; k + LANES<A> <= valid; k += LANES<A>) total += load(weight + k) * load(maxima + k);
  const Vector<A> last = load(weight + k) * load(maxima + k);
  return sum<A>(total + (lane_numbers<A>() < Integer<A>(valid - k) ? last : Vector<A>{}));
}

// Whether all similarities are finite in the strips that columns first <= c < last touch, by the sums of what
// `reduce_columns` multiplied by 0. The whole strips: `reduce_rows` adds -inf to the columns of neighbours.
template <typename A>
MLIP_FORCED bool all_finite(const A* zeros, int64_t first, int64_t last) {
  Vector<A> total = {};
  for (int64_t k = first / LANES<A> * LANES<A>; k < last; k += LANES<A>) total += load(zeros + k);
  return sum<A>(total) == 0;
}

// What the valid tokens of one side found on the other.
template <typename A>
struct Found {
  const A *weight, *maxima;
  const Integer<A>* argmax;
};

// The results of image b and text c.
template <typename A>
static void write_pair(const TokenMaximaResults<A>& to, const TokenMaximaTiles& tiles, int64_t b, int64_t c,
                       Found<A> by_image, Found<A> by_text) {
  const ValidTokens &images = tiles.images, &texts = tiles.texts;
  const int64_t n = images.count, m = texts.count, pair = b * texts.batch + c;
  const int32_t *image_index = images.index + images.first[b], *text_index = texts.index + texts.first[c];
  int64_t rows = images.of(b), columns = texts.of(c);
  if (rows == 0 || columns == 0) rows = columns = 0;  // nothing to be found on one side: zeros on both
  to.per_image[pair] = mean(by_image.weight, by_image.maxima, rows);
  to.per_text[c * images.batch + b] = mean(by_text.weight, by_text.maxima, columns);
  const bool plain = leading(image_index, rows) && leading(text_index, columns);
  write_argmax(to.argmax_text, to.argmax_text_bytes, pair * n, n, image_index, text_index, plain, by_image.argmax,
               rows);
  write_argmax(to.argmax_image, to.argmax_image_bytes, pair * m, m, text_index, image_index, plain, by_text.argmax,
               columns);
  write_maxima(to.text_maxima, pair * n, n, image_index, by_image.maxima, rows);
  write_maxima(to.image_maxima, pair * m, m, text_index, by_text.maxima, columns);
}

// Working memory of one thread for tiles of packed elements E, in arrays that start on cache lines.
template <typename E, typename A = SumOf<E>>
struct TileMemory {
  E *rows, *room;
  A *tile, *column_maxima, *zeros, *row_weight, *row_maxima;
  Integer<A>*argmax_rows, *argmax_columns;

  TileMemory(void* scratch, const TokenMaximaTiles& tiles, int64_t steps) {
    constexpr int64_t L = LANES<A>;
    auto* next = static_cast<char*>(scratch);
    const auto take = [&next](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
      next += (count * int64_t(sizeof *array) + 63) / 64 * 64;
    };
    take(rows, tiles.most_rows * steps);
    take(room, steps + L);
    take(tile, (tiles.most_rows + L) * tiles.most_columns);
    take(column_maxima, tiles.most_images * tiles.most_columns + L);
    take(argmax_rows, tiles.most_images * tiles.most_columns + L);
    take(zeros, tiles.most_images * tiles.most_columns + L);
    take(row_weight, tiles.most_rows + L);
    take(row_maxima, tiles.most_rows + L);
    take(argmax_columns, tiles.most_rows + L);
  }
};

// The results of a group of images, whose rows are packed, with a group of texts, packed into strips.
template <typename E, typename A = SumOf<E>>
static void maxima_of_tile(const TokenMaximaResults<A>& results, const TokenMaximaTiles& tiles,
                           const TokenGroup& images, const TokenGroup& texts, const E* strips, const A* column_weight,
                           int64_t steps, const TileMemory<E>& memory) {
  constexpr int64_t L = LANES<A>;
  constexpr auto SIZES = std::make_integer_sequence<int, TILE_ROWS>{};
  const auto [packed_rows, room, tile, column_maxima, zeros, row_weight, row_maxima, argmax_rows, argmax_columns] =
      memory;
  const int64_t rows = images.length, columns = texts.length, stride = rows * L;
  const RowTiles row_tiles(rows);
  for (int64_t column = 0; column < columns; column += TILE_STRIPS * L) {
    const bool pair_of_strips = columns - column > L;
    for (int64_t t = 0; t < row_tiles.tiles; ++t) {
      const int64_t row = row_tiles.begin(t), height = row_tiles.begin(t + 1) - row;
      const E* row_tile = packed_rows + row * steps;
      A* to = tile + column * rows + row * L;
      if (pair_of_strips) {
        similarities_of<E, 2>(height, SIZES, row_tile, strips + column * steps, steps, to, stride);
      } else {
        similarities_of<E, 1>(height, SIZES, row_tile, strips + column * steps, steps, to, stride);
      }
    }
    for (int64_t strip = column; strip < column + (pair_of_strips ? 2 : 1) * L; strip += L) {
      for (int64_t b = images.first; b < images.last; ++b) {
        const int64_t at = (b - images.first) * columns + strip, row = tiles.images.first[b] - images.start;
        reduce_columns(tile + strip * rows + row * L, tiles.images.of(b), column_maxima + at, argmax_rows + at,
                       zeros + at);
      }
    }
  }

  for (int64_t c = texts.first; c < texts.last; ++c) {
    const int64_t first = tiles.texts.first[c] - tiles.texts.first[texts.first], last = first + tiles.texts.of(c);
    if (rows > 0 && last > first) {
      const bool keep_argmax = results.argmax_text != nullptr;
      reduce_rows(tile, stride, rows, first, last, row_maxima, keep_argmax ? argmax_columns : nullptr);
    }
    for (int64_t b = images.first; b < images.last; ++b) {
      const int64_t row = tiles.images.first[b] - images.start, height = tiles.images.of(b);
      const int64_t row_at = (b - images.first) * columns, at = row_at + first;
      if (height > 0 && last > first && !all_finite(zeros + row_at, first, last)) {
        reduce_any(tile + row * L, stride, height, first, last, row_maxima + row, argmax_columns + row,
                   column_maxima + at, argmax_rows + at);
      }
      write_pair(results, tiles, b, c, Found<A>{row_weight + row, row_maxima + row, argmax_columns + row},
                 Found<A>{column_weight + first, column_maxima + at, argmax_rows + at});
    }
  }
}

template <typename T>
static void maxima(const TokenMaxima<T>& p, const TokenMaximaTiles& tiles, const TokenMaximaBlock& block,
                   const void* packed, const void* weight, void* scratch, int64_t begin, int64_t end) {
  using E = Element<T>;
  const int64_t steps = steps_of<E>(p.channels);
  const TileMemory<E> memory(scratch, tiles, steps);
  int64_t packed_group = -1;
  for (int64_t task = begin; task < end; ++task) {
    const TokenGroup& images = block.images[task / block.text_groups];
    const TokenGroup& texts = block.texts[task % block.text_groups];
    if (packed_group != task / block.text_groups) {
      packed_group = task / block.text_groups;
      pack_rows(p, tiles.images, images, memory.rows, memory.row_weight, memory.room);
    }
    maxima_of_tile(p.results, tiles, images, texts, static_cast<const E*>(packed) + texts.start * steps,
                   static_cast<const Accumulate<T>*>(weight) + texts.start, steps, memory);
  }
}

#else

namespace mlip::cpu {
namespace {

// The second-level cache, 1 MiB on many processors, is to hold a tile of similarities and the packed rows; the
// last-level cache the packed columns of a block.
constexpr int64_t TILE_BYTES = 384 << 10, ROW_BYTES = 256 << 10, BLOCK_BYTES = 16 << 20;
constexpr int64_t MOST_ROWS = 128, MOST_IMAGES = 16;

template <typename T>
ValidTokens find_valid(const Tokens<T>& side, std::vector<int64_t>& first, std::vector<int32_t>& index) {
  first.reserve(size_t(side.batch) + 1);
  index.reserve(size_t(side.batch * side.count));
  first.push_back(0);
  for (int64_t i = 0; i < side.batch; ++i) {
    for (int64_t k = 0; k < side.count; ++k) {
      if (side.mask == nullptr || side.mask[i * side.count + k]) index.push_back(int32_t(k));
    }
    first.push_back(int64_t(index.size()));
  }
  return {side.batch, side.count, first.data(), index.data()};
}

int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Cuts a side into groups of at most `most` members with at most `budget` valid tokens, or of one member.
std::vector<TokenGroup> grouped(const std::vector<int64_t>& first, int64_t most, int64_t budget) {
  std::vector<TokenGroup> groups;
  const int64_t batch = int64_t(first.size()) - 1;
  for (int64_t begin = 0, end = 0; begin < batch; begin = end) {
    end = begin + 1;
    while (end < batch && end - begin < most && first[size_t(end) + 1] - first[size_t(begin)] <= budget) ++end;
    groups.push_back({begin, end, first[size_t(begin)], first[size_t(end)] - first[size_t(begin)]});
  }
  return groups;
}

}  // namespace

int64_t TokenMaximaTiling::scratch_bytes() const {
  const int64_t rows = tiles.most_rows + lanes, columns = tiles.most_images * tiles.most_columns + lanes, arrays = 9;
  return ((rows + 1) * steps + rows * tiles.most_columns + 3 * columns + 3 * rows) * element_bytes + arrays * 64;
}

template <typename T>
TokenMaximaTiling token_maxima_tiling(const TokenMaxima<T>& problem) {
  constexpr int64_t BYTES[] = {16, 32, 64, 64};
  const bool pairs = std::is_same_v<T, BFloat16> && capability() == Capability::avx512_bf16;
  TokenMaximaTiling tiling{};
  TokenMaximaTiles& tiles = tiling.tiles;
  tiling.lanes = BYTES[int(capability())] / int64_t(sizeof(Accumulate<T>));
  tiling.steps = pairs ? (problem.channels + 1) / 2 : problem.channels;
  tiling.element_bytes = int64_t(sizeof(Accumulate<T>));
  tiles.images = find_valid(problem.images, tiling.image_first, tiling.image_index);
  tiles.texts = find_valid(problem.texts, tiling.text_first, tiling.text_index);

  const int64_t token_bytes = tiling.steps * tiling.element_bytes;
  tiling.image_groups = grouped(tiling.image_first, MOST_IMAGES, std::min(MOST_ROWS, ROW_BYTES / token_bytes));
  for (const TokenGroup& group : tiling.image_groups) {
    tiles.most_images = std::max(tiles.most_images, group.last - group.first);
    tiles.most_rows = std::max(tiles.most_rows, group.length);
  }
  const int64_t columns = TILE_BYTES / tiling.element_bytes / std::max(tiles.most_rows, int64_t(1));
  tiling.text_groups = grouped(tiling.text_first, INT64_MAX, columns);

  // Blocks: consecutive groups of texts, whose columns are counted anew in each.
  int64_t in_block = 0, begin = 0;
  const auto close = [&](int64_t end) {
    if (end == begin) return;
    const auto count = int64_t(tiling.image_groups.size());
    tiling.blocks.push_back({tiling.image_groups.data(), tiling.text_groups.data() + begin, count, end - begin});
    tiling.most_columns_a_block = std::max(tiling.most_columns_a_block, in_block);
    in_block = 0, begin = end;
  };
  for (int64_t g = 0; g < int64_t(tiling.text_groups.size()); ++g) {
    TokenGroup& group = tiling.text_groups[size_t(g)];
    group.length = whole(group.length, tiling.lanes);
    if ((in_block + group.length) * token_bytes > BLOCK_BYTES) close(g);
    group.start = in_block;
    in_block += group.length;
    tiles.most_columns = std::max(tiles.most_columns, group.length);
  }
  close(int64_t(tiling.text_groups.size()));
  return tiling;
}

template <typename T>
void token_maxima_pack(const TokenMaxima<T>& problem, const TokenMaximaTiling& tiling, const TokenMaximaBlock& block,
                       void* packed, int64_t begin, int64_t end) {
  void* weights = static_cast<char*>(packed) + tiling.packed_elements() * tiling.element_bytes;
  Scratch room(size_t((tiling.steps + tiling.lanes) * tiling.element_bytes), false);
  MLIP_DISPATCH_ISA_BF16(T, pack_texts<T>, problem, tiling.tiles.texts, block.texts, packed, weights, room.as<void>(),
                         begin, end);
}

template <typename T>
void token_maxima(const TokenMaxima<T>& problem, const TokenMaximaTiling& tiling, const TokenMaximaBlock& block,
                  const void* packed, int64_t begin, int64_t end) {
  const void* weights = static_cast<const char*>(packed) + tiling.packed_elements() * tiling.element_bytes;
  Scratch scratch(size_t(tiling.scratch_bytes()), false);
  MLIP_DISPATCH_ISA_BF16(T, maxima<T>, problem, tiling.tiles, block, packed, weights, scratch.as<void>(), begin, end);
}

#define MLIP_INSTANTIATE(T)                                                                                            \
  template TokenMaximaTiling token_maxima_tiling<T>(const TokenMaxima<T>&);                                            \
  template void token_maxima_pack<T>(const TokenMaxima<T>&, const TokenMaximaTiling&, const TokenMaximaBlock&, void*,  \
                                     int64_t, int64_t);                                                                \
  template void token_maxima<T>(const TokenMaxima<T>&, const TokenMaximaTiling&, const TokenMaximaBlock&, const void*, \
                                int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu

#endif  // MLIP_VECTOR_BYTES
