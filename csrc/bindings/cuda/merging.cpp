// Merging family, CUDA C++ kernels: registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/device.h"
#include "bindings/merging_maps.h"
#include "cuda/merging/merging.h"

namespace mlip::bindings {
namespace {

namespace kernels = cuda::merging;
using Optional = std::optional<Tensor>;

// --- which tokens merge ----------------------------------------------------------------------------------------------

kernels::GuideType guide_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kernels::GuideType::float32;
    case ScalarType::Half:
      return kernels::GuideType::float16;
    case ScalarType::BFloat16:
      return kernels::GuideType::bfloat16;
    case ScalarType::Double:
      return kernels::GuideType::float64;
    default:
      fail("guide: expected a floating-point dtype, got ", type);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> match(const Tensor& metric_, int64_t r, const Optional& guide,
                                                         double guide_weight, int64_t prefix, const Optional& mask_) {
  constexpr int64_t MOST_TOKENS = 1 << 24;  // tokens are counted in 32 bits
  MLIP_CHECK(metric_.dim() == 3 && metric_.size(2) > 0, "metric: expected [B, N, D], D >= 1");
  const int64_t batch = metric_.size(0), tokens = metric_.size(1);
  MLIP_CHECK(tokens <= MOST_TOKENS, "metric: expected at most ", MOST_TOKENS, " tokens, got ", tokens);
  MLIP_CHECK(prefix >= 0 && r >= 1 && r <= (tokens - prefix) / 2, "r: expected 1 <= r <= (N - prefix_tokens) / 2");
  if (guide) check("guide", *guide, {batch, tokens}, guide->scalar_type());
  if (mask_) check("mask", *mask_, {batch, tokens}, ScalarType::Bool);
  const OnDevice device(metric_);
  const Tensor metric = with_unit_stride(metric_);
  const Optional mask = contiguous(mask_);

  Tensor assignment = torch::stable::new_empty(metric, {batch, tokens}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(metric, {batch, tokens - r}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(metric, {batch, r}, ScalarType::Long);
  Tensor merged_mask = torch::stable::new_empty(metric, {batch, mask ? tokens - r : 0}, ScalarType::Bool);
  Tensor dropped = torch::stable::new_empty(metric, {batch, mask ? tokens : 0}, ScalarType::Bool);
  if (batch == 0) return {assignment, kept, removed, merged_mask, dropped};

  kernels::Match problem{};
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
  const int64_t scored = tokens > kernels::Match::ONE_LAUNCH ? problem.sources() : 0;
  Tensor key = torch::stable::new_empty(metric, {batch, scored}, ScalarType::Long);
  Tensor target = torch::stable::new_empty(metric, {batch, scored}, ScalarType::Int);
  problem.key = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(key));
  problem.target = mutable_data<int>(target);
  kernels::choose_stages(problem);
  MLIP_CHECK(kernels::match_blocks(problem) <= cuda::LARGEST_GRID, "metric: ", batch,
             " samples are more than one launch takes");
  kernels::match(problem, device.stream());
  check_launch("merging_match");
  return {assignment, kept, removed, merged_mask, dropped};
}

// --- merging rows ----------------------------------------------------------------------------------------------------

struct Plan : MergingMaps {
  Plan(const Tensor& assignment, const Tensor& kept, const Tensor& removed, const Optional& mask,
       const Optional& dropped)
      : MergingMaps(assignment, kept, removed, mask, dropped) {
    constexpr int64_t MOST_TOKENS = 0x7fffffff;
    MLIP_CHECK(tokens <= MOST_TOKENS, "assignment: expected at most ", MOST_TOKENS, " tokens, got ", tokens);
  }

  bool empty() const { return batch == 0 || outputs == 0; }

  kernels::MergeRows problem(const Tensor& from, Tensor& to) const {
    auto problem = problem_of<kernels::MergeRows>(from);
    problem.type = cuda_type(from.scalar_type());
    problem.from = from.const_data_ptr();
    problem.to = to.mutable_data_ptr();
    problem.vector = rows_are_vectors(from) && rows_are_vectors(to);
    return problem;
  }
};

void check_grid(const char* name, int64_t blocks, const Plan& plan) {
  MLIP_CHECK(blocks <= cuda::LARGEST_GRID, name, ": ", plan.batch, " samples of ", plan.tokens,
             " tokens are more than one launch takes");
}

std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& x_, const Optional& size_, const Tensor& assignment,
                                         const Tensor& kept, const Tensor& removed, const Optional& mask,
                                         const Optional& dropped) {
  const OnDevice device(x_);
  const Plan plan(assignment, kept, removed, mask, dropped);
  const Tensor x = rows_of("x", x_, plan.batch, plan.tokens);
  if (size_) check("size", *size_, {plan.batch, plan.tokens}, ScalarType::Float);
  const Optional size = contiguous(size_);
  Tensor merged = torch::stable::new_empty(x, {plan.batch, plan.outputs, x.size(2)});
  Tensor merged_size = torch::stable::new_empty(x, {plan.batch, plan.outputs}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(x, {plan.batch, plan.tokens}, ScalarType::Float);
  if (plan.empty()) return {merged, merged_size, weight};

  kernels::MergeRows problem = plan.problem(x, merged);
  problem.size = data_or_null<float>(size);
  problem.merged_size = mutable_data<float>(merged_size);
  problem.weight = mutable_data<float>(weight);
  check_grid("x", kernels::merge_blocks(problem), plan);
  kernels::merge_rows(problem, device.stream());
  check_launch("merging_merge");
  return {merged, merged_size, weight};
}

Tensor combine(const Tensor& x_, const Optional& weight_, const Tensor& assignment, const Tensor& kept,
               const Tensor& removed, const Optional& dropped) {
  const OnDevice device(x_);
  const Plan plan(assignment, kept, removed, std::nullopt, dropped);
  const Tensor x = rows_of("x", x_, plan.batch, plan.tokens);
  if (weight_) check("weight", *weight_, {plan.batch, plan.tokens}, ScalarType::Float);
  const Optional weight = contiguous(weight_);
  Tensor combined = torch::stable::new_empty(x, {plan.batch, plan.outputs, x.size(2)});
  if (combined.numel() == 0) return combined;

  kernels::MergeRows problem = plan.problem(x, combined);
  problem.known_weight = data_or_null<float>(weight);
  check_grid("x", kernels::merge_blocks(problem), plan);
  kernels::combine_rows(problem, device.stream());
  check_launch("merging_combine");
  return combined;
}

Tensor spread(const Tensor& y_, const Optional& weight_, const Tensor& assignment, const Tensor& kept,
              const Tensor& removed, const Optional& dropped) {
  const OnDevice device(y_);
  const Plan plan(assignment, kept, removed, std::nullopt, dropped);
  const Tensor y = rows_of("y", y_, plan.batch, plan.outputs);
  if (weight_) check("weight", *weight_, {plan.batch, plan.tokens}, ScalarType::Float);
  const Optional weight = contiguous(weight_);
  Tensor spread = torch::stable::new_empty(y, {plan.batch, plan.tokens, y.size(2)});
  if (spread.numel() == 0) return spread;

  kernels::MergeRows problem = plan.problem(y, spread);
  problem.known_weight = data_or_null<float>(weight);
  check_grid("y", kernels::spread_blocks(problem), plan);
  kernels::spread_rows(problem, device.stream());
  check_launch("merging_spread");
  return spread;
}

// --- weighted means --------------------------------------------------------------------------------------------------

kernels::WeightedMean weighted_mean_problem(ScalarType type, int64_t batch, int64_t tokens, int64_t channels,
                                            int64_t prefix, const Optional& weight) {
  kernels::WeightedMean problem{};
  problem.type = cuda_type(type);
  problem.batch = batch;
  problem.tokens = tokens;
  problem.channels = channels;
  problem.prefix = prefix;
  problem.weight = data_or_null<float>(weight);
  return problem;
}

std::tuple<Tensor, Tensor> weighted_mean(const Tensor& x_, const Optional& weight_, int64_t prefix) {
  MLIP_CHECK(x_.dim() == 3, "x: expected [B, N, D]");
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  check_prefix(prefix, tokens);
  if (weight_) check("weight", *weight_, {batch, tokens}, ScalarType::Float);
  const OnDevice device(x_);
  const Tensor x = with_unit_stride(x_);
  const Optional weight = contiguous(weight_);
  Tensor mean = torch::stable::new_empty(x, {batch, channels});
  Tensor total = torch::stable::new_empty(x, {batch}, ScalarType::Float);
  if (batch == 0) return {mean, total};

  kernels::WeightedMean problem = weighted_mean_problem(x.scalar_type(), batch, tokens, channels, prefix, weight);
  problem.x = x.const_data_ptr();
  problem.stride_batch = x.stride(0);
  problem.stride_token = x.stride(1);
  problem.mean = mean.mutable_data_ptr();
  problem.total = mutable_data<float>(total);
  problem.vector = rows_are_vectors(x);
  problem.splits = kernels::weighted_mean_splits(problem.type, batch, tokens - prefix, channels);
  const int64_t parts = problem.splits > 1 ? problem.splits : 0;
  Tensor partial = torch::stable::new_empty(x, {parts, batch, channels}, ScalarType::Float);
  Tensor partial_total = torch::stable::new_empty(x, {parts, batch}, ScalarType::Float);
  problem.partial = mutable_data<float>(partial);
  problem.partial_total = mutable_data<float>(partial_total);
  kernels::weighted_mean_forward(problem, device.stream());
  check_launch("merging_weighted_mean");
  return {mean, total};
}

Tensor weighted_mean_backward(const Tensor& grad_, const Optional& weight_, const Tensor& total_, int64_t tokens,
                              int64_t prefix) {
  MLIP_CHECK(grad_.dim() == 2, "grad: expected [B, D]");
  const int64_t batch = grad_.size(0), channels = grad_.size(1);
  check_prefix(prefix, tokens);
  check("total", total_, {batch}, ScalarType::Float);
  if (weight_) check("weight", *weight_, {batch, tokens}, ScalarType::Float);
  const OnDevice device(grad_);
  const Tensor grad = torch::stable::contiguous(grad_), total = torch::stable::contiguous(total_);
  const Optional weight = contiguous(weight_);
  Tensor grad_x = torch::stable::new_empty(grad, {batch, tokens, channels});
  if (batch == 0) return grad_x;

  kernels::WeightedMean problem = weighted_mean_problem(grad.scalar_type(), batch, tokens, channels, prefix, weight);
  problem.grad = grad.const_data_ptr();
  problem.known_total = data<float>(total);
  problem.grad_x = grad_x.mutable_data_ptr();
  problem.vector = rows_are_vectors(grad) && rows_are_vectors(grad_x);
  kernels::weighted_mean_backward(problem, device.stream());
  check_launch("merging_weighted_mean_backward");
  return grad_x;
}

Tensor weighted_mean_backward_weight(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Tensor& total_,
                                     int64_t prefix) {
  MLIP_CHECK(x_.dim() == 3, "x: expected [B, N, D]");
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  check_prefix(prefix, tokens);
  check("grad", grad_, {batch, channels}, x_.scalar_type());
  check("weight", weight_, {batch, tokens}, ScalarType::Float);
  check("total", total_, {batch}, ScalarType::Float);
  const OnDevice device(x_);
  const Tensor grad = torch::stable::contiguous(grad_), total = torch::stable::contiguous(total_);
  const Tensor weight = torch::stable::contiguous(weight_), x = with_unit_stride(x_);
  Tensor grad_weight = torch::stable::new_empty(x, {batch, tokens}, ScalarType::Float);
  if (batch == 0) return grad_weight;

  kernels::WeightedMean problem = weighted_mean_problem(x.scalar_type(), batch, tokens, channels, prefix, weight);
  problem.x = x.const_data_ptr();
  problem.stride_batch = x.stride(0);
  problem.stride_token = x.stride(1);
  problem.grad = grad.const_data_ptr();
  problem.known_total = data<float>(total);
  problem.grad_weight = mutable_data<float>(grad_weight);
  problem.vector = rows_are_vectors(x) && rows_are_vectors(grad);
  kernels::weighted_mean_backward_weight(problem, device.stream());
  check_launch("merging_weighted_mean_backward_weight");
  return grad_weight;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("merging_match", TORCH_BOX(&match));
  m.impl("merging_merge", TORCH_BOX(&merge));
  m.impl("merging_combine", TORCH_BOX(&combine));
  m.impl("merging_spread", TORCH_BOX(&spread));
  m.impl("merging_weighted_mean", TORCH_BOX(&weighted_mean));
  m.impl("merging_weighted_mean_backward", TORCH_BOX(&weighted_mean_backward));
  m.impl("merging_weighted_mean_backward_weight", TORCH_BOX(&weighted_mean_backward_weight));
}

}  // namespace
}  // namespace mlip::bindings
