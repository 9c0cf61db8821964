#include "cpu/contrastive/token_maxima.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#define MLIP_BF16_VARIANT
#define MLIP_KERNELS "cpu/contrastive/token_maxima_kernels.h"
#include "cpu/simd.h"

namespace mlip::cpu {
namespace {

// The second-level cache, 1 MiB on many processors, is to hold a tile of similarities and the packed rows; the
// last-level cache the packed columns of a block.
constexpr int64_t TILE_BYTES = 384 << 10, ROW_BYTES = 256 << 10, BLOCK_BYTES = 16 << 20;
constexpr int64_t MOST_ROWS = 128, MOST_IMAGES = 16;

template <typename T>
void find_real(const Tokens<T>& side, std::vector<int64_t>& first, std::vector<int32_t>& place) {
  first.reserve(size_t(side.batch) + 1);
  place.reserve(size_t(side.batch * side.count));
  first.push_back(0);
  for (int64_t i = 0; i < side.batch; ++i) {
    for (int64_t k = 0; k < side.count; ++k) {
      if (side.mask == nullptr || side.mask[i * side.count + k]) place.push_back(int32_t(k));
    }
    first.push_back(int64_t(place.size()));
  }
}

int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Cuts a side into groups of at most `most` members with at most `budget` real tokens, or of one member.
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

int64_t TokenMaximaPlan::scratch_bytes() const {
  const int64_t rows = most_rows + lanes, columns = most_images * most_columns + lanes, arrays = 9;
  return ((rows + 1) * steps + rows * most_columns + 3 * columns + 3 * rows) * element_bytes + arrays * 64;
}

template <typename T>
TokenMaximaPlan token_maxima_plan(const TokenMaxima<T>& problem) {
  constexpr int64_t BYTES[] = {16, 32, 64, 64};
  const bool pairs = std::is_same_v<T, BFloat16> && capability() == Capability::avx512_bf16;
  TokenMaximaPlan plan{};
  plan.lanes = BYTES[int(capability())] / int64_t(sizeof(Accumulate<T>));
  plan.steps = pairs ? (problem.channels + 1) / 2 : problem.channels;
  plan.element_bytes = int64_t(sizeof(Accumulate<T>));
  find_real(problem.images, plan.image_first, plan.image_place);
  find_real(problem.texts, plan.text_first, plan.text_place);

  const int64_t token_bytes = plan.steps * plan.element_bytes;
  plan.image_groups = grouped(plan.image_first, MOST_IMAGES, std::min(MOST_ROWS, ROW_BYTES / token_bytes));
  for (const TokenGroup& group : plan.image_groups) {
    plan.most_images = std::max(plan.most_images, group.last - group.first);
    plan.most_rows = std::max(plan.most_rows, group.length);
  }
  const int64_t columns = TILE_BYTES / plan.element_bytes / std::max(plan.most_rows, int64_t(1));
  plan.text_groups = grouped(plan.text_first, INT64_MAX, columns);

  // Blocks: consecutive groups of texts, whose columns are counted anew in each.
  int64_t in_block = 0, begin = 0;
  const auto close = [&](int64_t end) {
    if (end == begin) return;
    const auto count = int64_t(plan.image_groups.size());
    plan.blocks.push_back({plan.image_groups.data(), plan.text_groups.data() + begin, count, end - begin});
    plan.most_columns_a_block = std::max(plan.most_columns_a_block, in_block);
    in_block = 0, begin = end;
  };
  for (int64_t g = 0; g < int64_t(plan.text_groups.size()); ++g) {
    TokenGroup& group = plan.text_groups[size_t(g)];
    group.length = whole(group.length, plan.lanes);
    if ((in_block + group.length) * token_bytes > BLOCK_BYTES) close(g);
    group.start = in_block;
    in_block += group.length;
    plan.most_columns = std::max(plan.most_columns, group.length);
  }
  close(int64_t(plan.text_groups.size()));
  return plan;
}

template <typename T>
void token_maxima_pack(const TokenMaxima<T>& problem, const TokenMaximaPlan& plan, const TokenMaximaBlock& block,
                       void* packed, int64_t begin, int64_t end) {
  void* shares = static_cast<char*>(packed) + plan.packed_elements() * plan.element_bytes;
  Scratch room(size_t((plan.steps + plan.lanes) * plan.element_bytes), false);
  MLIP_DISPATCH_ISA_BF16(T, pack_texts<T>, problem, plan.cut().texts, block.texts, packed, shares, room.as<void>(),
                         begin, end);
}

template <typename T>
void token_maxima(const TokenMaxima<T>& problem, const TokenMaximaPlan& plan, const TokenMaximaBlock& block,
                  const void* packed, int64_t begin, int64_t end) {
  const void* shares = static_cast<const char*>(packed) + plan.packed_elements() * plan.element_bytes;
  Scratch scratch(size_t(plan.scratch_bytes()), false);
  MLIP_DISPATCH_ISA_BF16(T, maxima<T>, problem, plan.cut(), block, packed, shares, scratch.as<void>(), begin, end);
}

#define MLIP_INSTANTIATE(T)                                                                                          \
  template TokenMaximaPlan token_maxima_plan<T>(const TokenMaxima<T>&);                                              \
  template void token_maxima_pack<T>(const TokenMaxima<T>&, const TokenMaximaPlan&, const TokenMaximaBlock&, void*,  \
                                     int64_t, int64_t);                                                              \
  template void token_maxima<T>(const TokenMaxima<T>&, const TokenMaximaPlan&, const TokenMaximaBlock&, const void*, \
                                int64_t, int64_t)

MLIP_INSTANTIATE(float);
MLIP_INSTANTIATE(double);
MLIP_INSTANTIATE(BFloat16);
MLIP_INSTANTIATE(Half);

}  // namespace mlip::cpu
