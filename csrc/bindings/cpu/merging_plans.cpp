// Merging family, CPU key: which tokens merge. Checks, allocation, threads; the kernels themselves do not know torch.
#include <tuple>
#include <vector>

#include "bindings/cpu/tensors.h"
#include "cpu/merging/match.h"

namespace mlip::bindings {
namespace {

using Maps = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Maps match(const Tensor& metric_, int64_t r, const std::optional<Tensor>& guide_, double guide_weight, int64_t prefix,
           const std::optional<Tensor>& mask_) {
  MLIP_CHECK(metric_.dim() == 3 && metric_.size(2) > 0, "metric: expected [B, N, D], D >= 1");
  const int64_t batch = metric_.size(0), tokens = metric_.size(1);
  MLIP_CHECK(prefix >= 0 && r >= 1 && r <= (tokens - prefix) / 2, "r: expected 1 <= r <= (N - prefix_tokens) / 2");
  if (guide_) check("guide", *guide_, {batch, tokens}, guide_->scalar_type());
  if (mask_) check("mask", *mask_, {batch, tokens}, ScalarType::Bool);
  const Tensor metric = with_unit_stride(metric_);
  const std::optional<Tensor> mask = contiguous(mask_);
  std::optional<Tensor> guide;
  if (guide_) guide = torch::stable::contiguous(torch::stable::to(*guide_, ScalarType::Double));

  Tensor assignment = torch::stable::new_empty(metric, {batch, tokens}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(metric, {batch, tokens - r}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(metric, {batch, r}, ScalarType::Long);
  Tensor merged_mask = torch::stable::new_empty(metric, {batch, mask ? tokens - r : 0}, ScalarType::Bool);
  Tensor dropped = torch::stable::new_empty(metric, {batch, mask ? tokens : 0}, ScalarType::Bool);

  for_type(metric.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cpu::Similarities<T> problem{};
    problem.batch = batch;
    problem.tokens = tokens;
    problem.prefix = prefix;
    problem.r = r;
    problem.guide = data_or_null<double>(guide);
    problem.guide_weight = guide_weight;
    problem.mask = flags_or_null(mask);
    problem.metric = data<T>(metric);
    problem.stride_batch = metric.stride(0);
    problem.stride_token = metric.stride(1);
    problem.width = metric.size(2);
    std::vector<cpu::Proposal> proposals(size_t(batch * problem.sources()));
    problem.proposals = proposals.data();
    problem.assignment = mutable_data<int64_t>(assignment);
    problem.kept = mutable_data<int64_t>(kept);
    problem.removed = mutable_data<int64_t>(removed);
    problem.merged_mask = mutable_data<bool>(merged_mask);
    problem.dropped = mutable_data<bool>(dropped);

    parallel_for(0, problem.tasks(), grain(problem.group() * problem.width),
                 [&](int64_t begin, int64_t end) { cpu::match_similarities(problem, begin, end); });
    parallel_for(0, batch, grain(16 * tokens),
                 [&](int64_t begin, int64_t end) { cpu::match_maps(problem, begin, end); });
  });
  return {assignment, kept, removed, merged_mask, dropped};
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) { m.impl("merging_match", TORCH_BOX(&match)); }

}  // namespace
}  // namespace mlip::bindings
