// Merging family, CPU key: checks, allocation, threads. The kernels themselves do not know torch.
#include <atomic>
#include <tuple>
#include <vector>

#include "bindings/cpu/tensors.h"
#include "bindings/merging_maps.h"
#include "cpu/merging/merge.h"
#include "cpu/merging/weighted_mean.h"

namespace mlip::bindings {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> match(const Tensor& metric_, int64_t r, const Optional& guide_,
                                                         double guide_weight, int64_t prefix, const Optional& mask_) {
  MLIP_CHECK(metric_.dim() == 3 && metric_.size(2) > 0, "metric: expected [B, N, D], D >= 1");
  const int64_t batch = metric_.size(0), tokens = metric_.size(1);
  MLIP_CHECK(prefix >= 0 && r >= 1 && r <= (tokens - prefix) / 2, "r: expected 1 <= r <= (N - prefix_tokens) / 2");
  if (guide_) check("guide", *guide_, {batch, tokens}, guide_->scalar_type());
  if (mask_) check("mask", *mask_, {batch, tokens}, ScalarType::Bool);
  const Tensor metric = with_unit_stride(metric_);
  const Optional mask = contiguous(mask_);
  Optional guide;
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
                 [&](int64_t begin, int64_t end) { cpu::match_indices(problem, begin, end); });
  });
  return {assignment, kept, removed, merged_mask, dropped};
}

template <typename T>
cpu::MergeRows<T> rows_problem(const MergingMaps& maps, const Tensor& from, Tensor& to, const Optional& weight) {
  auto problem = maps.problem_of<cpu::MergeRows<T>>(from);
  problem.from = data<T>(from);
  problem.to = mutable_data<T>(to);
  problem.weight = data_or_null<cpu::Accumulate<T>>(weight);
  return problem;
}

template <typename T>
int64_t block_grain(const cpu::MergeRows<T>& problem) {
  return grain(problem.block() * problem.channels);
}

// What a thread found wrong with the indices. Only the calling thread may raise an error.
class Fault {
 public:
  // Notes a fault, and returns whether there is none.
  bool none(const char* found) {
    if (found != nullptr) found_ = found;
    return found == nullptr;
  }
  void raise() const {
    if (const char* found = found_) fail(found);
  }

 private:
  std::atomic<const char*> found_{nullptr};
};

template <typename T>
void run_combine(const cpu::MergeRows<T>& problem) {
  parallel_for(0, problem.tasks(), block_grain(problem),
               [&](int64_t begin, int64_t end) { cpu::combine_rows(problem, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& x_, const Optional& size_, const Tensor& assignment,
                                         const Tensor& kept, const Tensor& removed, const Optional& mask,
                                         const Optional& dropped) {
  const MergingMaps maps(assignment, kept, removed, mask, dropped);
  const Tensor x = rows_of("x", x_, maps.batch, maps.tokens);
  if (size_) check("size", *size_, {maps.batch, maps.tokens}, ScalarType::Float);
  const Optional size = contiguous(size_);
  Tensor merged = torch::stable::new_empty(x, {maps.batch, maps.outputs, x.size(2)});
  Tensor merged_size = torch::stable::new_empty(x, {maps.batch, maps.outputs}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(x, {maps.batch, maps.tokens}, accumulate_in(x.scalar_type()));

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto problem = rows_problem<T>(maps, x, merged, weight);
    const float* sizes = data_or_null<float>(size);
    float* merged_sizes = mutable_data<float>(merged_size);
    auto* weights = mutable_data<cpu::Accumulate<T>>(weight);
    Fault fault;
    parallel_for(0, maps.batch, grain(16 * maps.tokens), [&](int64_t begin, int64_t end) {
      if (!fault.none(cpu::merge_fault(problem, begin, end))) return;
      cpu::merge_weights(problem, sizes, merged_sizes, weights, begin, end);
    });
    fault.raise();
    run_combine(problem);
  });
  return {merged, merged_size, weight};
}

Tensor combine(const Tensor& x_, const Optional& weight_, const Tensor& assignment, const Tensor& kept,
               const Tensor& removed, const Optional& dropped) {
  const MergingMaps maps(assignment, kept, removed, std::nullopt, dropped);
  const Tensor x = rows_of("x", x_, maps.batch, maps.tokens);
  if (weight_) check("weight", *weight_, {maps.batch, maps.tokens}, accumulate_in(x.scalar_type()));
  const Optional weight = contiguous(weight_);
  Tensor combined = torch::stable::new_empty(x, {maps.batch, maps.outputs, x.size(2)});
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto problem = rows_problem<T>(maps, x, combined, weight);
    Fault fault;
    parallel_for(0, maps.batch, grain(16 * maps.tokens),
                 [&](int64_t begin, int64_t end) { fault.none(cpu::merge_fault(problem, begin, end)); });
    fault.raise();
    run_combine(problem);
  });
  return combined;
}

Tensor unmerge(const Tensor& y_, const Optional& weight_, const Tensor& assignment, const Tensor& kept,
               const Tensor& removed, const Optional& dropped) {
  const MergingMaps maps(assignment, kept, removed, std::nullopt, dropped);
  const Tensor y = rows_of("y", y_, maps.batch, maps.outputs);
  if (weight_) check("weight", *weight_, {maps.batch, maps.tokens}, accumulate_in(y.scalar_type()));
  const Optional weight = contiguous(weight_);
  Tensor tokens = torch::stable::new_empty(y, {maps.batch, maps.tokens, y.size(2)});
  for_type(y.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto problem = rows_problem<T>(maps, y, tokens, weight);
    Fault fault;
    parallel_for(0, problem.tasks(), block_grain(problem), [&](int64_t begin, int64_t end) {
      if (fault.none(cpu::unmerge_fault(problem, begin, end))) cpu::unmerge_rows(problem, begin, end);
    });
    fault.raise();
  });
  return tokens;
}

template <typename T>
cpu::WeightedMean<T> weighted_mean_problem(int64_t batch, int64_t tokens, int64_t channels, int64_t prefix,
                                           const Optional& weight) {
  cpu::WeightedMean<T> problem{};
  problem.batch = batch;
  problem.tokens = tokens;
  problem.channels = channels;
  problem.prefix = prefix;
  problem.weight = data_or_null<cpu::Accumulate<T>>(weight);
  return problem;
}

template <typename T>
int64_t segment_grain(const cpu::WeightedMean<T>& problem) {
  const int64_t tokens = problem.tokens < problem.SEGMENT ? problem.tokens : problem.SEGMENT;
  return grain(tokens * problem.channels);
}

std::tuple<Tensor, Tensor> weighted_mean(const Tensor& x_, const Optional& weight_, int64_t prefix) {
  MLIP_CHECK(x_.dim() == 3, "x: expected [B, N, D]");
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  const ScalarType wide = accumulate_in(x_.scalar_type());
  check_prefix(prefix, tokens);
  if (weight_) check("weight", *weight_, {batch, tokens}, wide);
  const Tensor x = with_unit_stride(x_);
  const Optional weight = contiguous(weight_);
  Tensor mean = torch::stable::new_empty(x, {batch, channels});
  Tensor total = torch::stable::new_empty(x, {batch}, wide);

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = weighted_mean_problem<T>(batch, tokens, channels, prefix, weight);
    problem.x = data<T>(x);
    problem.stride_batch = x.stride(0);
    problem.stride_token = x.stride(1);
    problem.mean = mutable_data<T>(mean);
    problem.total = mutable_data<cpu::Accumulate<T>>(total);
    Tensor partial = torch::stable::new_empty(x, {problem.tasks(), channels}, wide);
    Tensor partial_total = torch::stable::new_empty(x, {problem.tasks()}, wide);
    problem.partial = mutable_data<cpu::Accumulate<T>>(partial);
    problem.partial_total = mutable_data<cpu::Accumulate<T>>(partial_total);

    parallel_for(0, problem.tasks(), segment_grain(problem),
                 [&](int64_t begin, int64_t end) { cpu::weighted_mean_sums(problem, begin, end); });
    if (problem.segments() > 1) {
      parallel_for(0, batch, grain(problem.segments() * channels),
                   [&](int64_t begin, int64_t end) { cpu::weighted_mean_finish(problem, begin, end); });
    }
  });
  return {mean, total};
}

Tensor weighted_mean_backward(const Tensor& grad_, const Optional& weight_, const Tensor& total_, int64_t tokens,
                              int64_t prefix) {
  MLIP_CHECK(grad_.dim() == 2, "grad: expected [B, D]");
  const int64_t batch = grad_.size(0), channels = grad_.size(1);
  const ScalarType wide = accumulate_in(grad_.scalar_type());
  check_prefix(prefix, tokens);
  check("total", total_, {batch}, wide);
  if (weight_) check("weight", *weight_, {batch, tokens}, wide);
  const Tensor grad = torch::stable::contiguous(grad_), total = torch::stable::contiguous(total_);
  const Optional weight = contiguous(weight_);
  Tensor grad_x = torch::stable::new_empty(grad, {batch, tokens, channels});

  for_type(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = weighted_mean_problem<T>(batch, tokens, channels, prefix, weight);
    problem.grad = data<T>(grad);
    problem.known_total = data<cpu::Accumulate<T>>(total);
    problem.grad_x = mutable_data<T>(grad_x);
    parallel_for(0, problem.tasks(), segment_grain(problem),
                 [&](int64_t begin, int64_t end) { cpu::weighted_mean_backward(problem, begin, end); });
  });
  return grad_x;
}

Tensor weighted_mean_backward_weight(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Tensor& total_,
                                     int64_t prefix) {
  MLIP_CHECK(x_.dim() == 3, "x: expected [B, N, D]");
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  const ScalarType wide = accumulate_in(x_.scalar_type());
  check_prefix(prefix, tokens);
  check("grad", grad_, {batch, channels}, x_.scalar_type());
  check("weight", weight_, {batch, tokens}, wide);
  check("total", total_, {batch}, wide);
  const Tensor grad = torch::stable::contiguous(grad_), total = torch::stable::contiguous(total_);
  const Tensor weight = torch::stable::contiguous(weight_), x = with_unit_stride(x_);
  Tensor grad_weight = torch::stable::new_empty(x, {batch, tokens}, wide);

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = weighted_mean_problem<T>(batch, tokens, channels, prefix, weight);
    problem.x = data<T>(x);
    problem.stride_batch = x.stride(0);
    problem.stride_token = x.stride(1);
    problem.grad = data<T>(grad);
    problem.known_total = data<cpu::Accumulate<T>>(total);
    problem.grad_weight = mutable_data<cpu::Accumulate<T>>(grad_weight);
    parallel_for(0, problem.tasks(), segment_grain(problem),
                 [&](int64_t begin, int64_t end) { cpu::weighted_mean_products(problem, begin, end); });
    parallel_for(0, batch, grain(tokens),
                 [&](int64_t begin, int64_t end) { cpu::weighted_mean_centre(problem, begin, end); });
  });
  return grad_weight;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("merging_combine", TORCH_BOX(&combine));
  m.impl("merging_match", TORCH_BOX(&match));
  m.impl("merging_merge", TORCH_BOX(&merge));
  m.impl("merging_spread", TORCH_BOX(&unmerge));
  m.impl("merging_weighted_mean", TORCH_BOX(&weighted_mean));
  m.impl("merging_weighted_mean_backward", TORCH_BOX(&weighted_mean_backward));
  m.impl("merging_weighted_mean_backward_weight", TORCH_BOX(&weighted_mean_backward_weight));
}

}  // namespace
}  // namespace mlip::bindings
