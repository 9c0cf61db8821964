// Merging family, CUDA C++ kernels: which tokens merge. Registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/device.h"
#include "bindings/cuda/launch.h"
#include "bindings/cuda/types.h"
#include "cuda/merging/match.h"

namespace mlip::bindings {
namespace {

using Maps = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t MOST_TOKENS = 1 << 24;  // tokens are counted in 32 bits
constexpr int64_t LARGEST_GRID = 0x7fffffff;

cuda::GuideType guide_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return cuda::GuideType::float32;
    case ScalarType::Half:
      return cuda::GuideType::float16;
    case ScalarType::BFloat16:
      return cuda::GuideType::bfloat16;
    case ScalarType::Double:
      return cuda::GuideType::float64;
    default:
      fail("guide: expected a floating-point dtype, got ", type);
  }
}

Maps match(const Tensor& metric_, int64_t r, const std::optional<Tensor>& guide, double guide_weight, int64_t prefix,
           const std::optional<Tensor>& mask_) {
  MLIP_CHECK(metric_.dim() == 3 && metric_.size(2) > 0, "metric: expected [B, N, D], D >= 1");
  const int64_t batch = metric_.size(0), tokens = metric_.size(1);
  MLIP_CHECK(tokens <= MOST_TOKENS, "metric: expected at most ", MOST_TOKENS, " tokens, got ", tokens);
  MLIP_CHECK(prefix >= 0 && r >= 1 && r <= (tokens - prefix) / 2, "r: expected 1 <= r <= (N - prefix_tokens) / 2");
  if (guide) check("guide", *guide, {batch, tokens}, guide->scalar_type());
  if (mask_) check("mask", *mask_, {batch, tokens}, ScalarType::Bool);
  const OnDevice device(metric_);
  const Tensor metric = with_unit_stride(metric_);
  const std::optional<Tensor> mask = contiguous(mask_);

  Tensor assignment = torch::stable::new_empty(metric, {batch, tokens}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(metric, {batch, tokens - r}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(metric, {batch, r}, ScalarType::Long);
  Tensor merged_mask = torch::stable::new_empty(metric, {batch, mask ? tokens - r : 0}, ScalarType::Bool);
  Tensor dropped = torch::stable::new_empty(metric, {batch, mask ? tokens : 0}, ScalarType::Bool);
  if (batch == 0) return {assignment, kept, removed, merged_mask, dropped};

  cuda::Match problem{};
  problem.type = cuda_type(metric.scalar_type());
  problem.batch = batch;
  problem.tokens = int(tokens);
  problem.prefix = int(prefix);
  problem.r = int(r);
  problem.metric = metric.const_data_ptr();
  problem.stride_batch = metric.stride(0);
  problem.stride_token = metric.stride(1);
  problem.width = metric.size(2);
  problem.vector = rows_are_vectors(metric);
  if (guide) {
    problem.guide = guide->const_data_ptr();
    problem.guide_type = guide_type(guide->scalar_type());
    problem.guide_stride_batch = guide->stride(0);
    problem.guide_stride_token = guide->stride(1);
    problem.guide_weight = guide_weight;
  }
  problem.mask = flags_or_null(mask);
  problem.assignment = mutable_data<int64_t>(assignment);
  problem.kept = mutable_data<int64_t>(kept);
  problem.removed = mutable_data<int64_t>(removed);
  problem.merged_mask = mutable_data<bool>(merged_mask);
  problem.dropped = mutable_data<bool>(dropped);
  const int64_t scored = tokens > cuda::Match::ONE_LAUNCH ? problem.sources() : 0;
  Tensor key = torch::stable::new_empty(metric, {batch, scored}, ScalarType::Long);
  Tensor best = torch::stable::new_empty(metric, {batch, scored}, ScalarType::Int);
  problem.key = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(key));
  problem.best = mutable_data<int>(best);
  cuda::match_plan(problem);
  MLIP_CHECK(cuda::match_blocks(problem) <= LARGEST_GRID, "metric: ", batch, " samples are more than one launch takes");
  cuda::match(problem, device.stream());
  check_launch("merging_match");
  return {assignment, kept, removed, merged_mask, dropped};
}

MLIP_CUDA_KERNELS(m) { m.impl("merging_match", TORCH_BOX(&match)); }

}  // namespace
}  // namespace mlip::bindings
