// Merging family, CPU key: merging rows and copying them back. The kernels themselves do not know torch.
#include <tuple>

#include "bindings/cpu/threads.h"
#include "cpu/merging/merge.h"

namespace mlip::bindings {
namespace {

// The maps of a matching, checked and contiguous, and the tensors that a problem points into.
struct Plan {
  int64_t batch, tokens, outputs;
  Tensor assignment, kept, removed;
  std::optional<Tensor> mask, dropped;

  Plan(const Tensor& assignment_, const Tensor& kept_, const Tensor& removed_, const std::optional<Tensor>& mask_,
       const std::optional<Tensor>& dropped_)
      : assignment(assignment_), kept(kept_), removed(removed_) {
    STD_TORCH_CHECK(assignment_.dim() == 2 && kept_.dim() == 2, "assignment, kept: expected [B, N] and [B, N']");
    batch = assignment_.size(0);
    tokens = assignment_.size(1);
    outputs = kept_.size(1);
    STD_TORCH_CHECK(outputs <= tokens, "kept: expected at most N columns");
    check("assignment", assignment_, {batch, tokens}, ScalarType::Long);
    check("kept", kept_, {batch, outputs}, ScalarType::Long);
    check("removed", removed_, {batch, tokens - outputs}, ScalarType::Long);
    if (mask_) check("mask", *mask_, {batch, outputs}, ScalarType::Bool);
    if (dropped_) check("dropped", *dropped_, {batch, tokens}, ScalarType::Bool);
    assignment = torch::stable::contiguous(assignment_);
    kept = torch::stable::contiguous(kept_);
    removed = torch::stable::contiguous(removed_);
    mask = contiguous(mask_);
    dropped = contiguous(dropped_);
  }

  template <typename T>
  cpu::MergeRows<T> problem(const Tensor& from, Tensor& to) const {
    cpu::MergeRows<T> problem{};
    problem.batch = batch;
    problem.tokens = tokens;
    problem.outputs = outputs;
    problem.channels = from.size(2);
    problem.from = data<T>(from);
    problem.stride_batch = from.stride(0);
    problem.stride_token = from.stride(1);
    problem.assignment = data<int64_t>(assignment);
    problem.kept = data<int64_t>(kept);
    problem.removed = data<int64_t>(removed);
    problem.mask = data_or_null<bool>(mask);
    problem.dropped = data_or_null<bool>(dropped);
    problem.to = mutable_data<T>(to);
    return problem;
  }
};

// x as [B, rows, C] with unit stride.
Tensor rows_of(const char* name, const Tensor& x, int64_t batch, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected three dimensions");
  check(name, x, {batch, rows, x.size(2)}, x.scalar_type());
  return x.size(2) > 0 ? with_unit_stride(x) : torch::stable::contiguous(x);
}

template <typename T>
int64_t block_grain(const cpu::MergeRows<T>& problem) {
  return grain(problem.block() * problem.channels);
}

template <typename T>
void run_combine(const cpu::MergeRows<T>& problem) {
  parallel_for(0, problem.tasks(), block_grain(problem),
               [&](int64_t begin, int64_t end) { cpu::combine_rows(problem, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& x_, const std::optional<Tensor>& size_, const Tensor& assignment,
                                         const Tensor& kept, const Tensor& removed, const std::optional<Tensor>& mask,
                                         const std::optional<Tensor>& dropped) {
  const Plan plan(assignment, kept, removed, mask, dropped);
  const Tensor x = rows_of("x", x_, plan.batch, plan.tokens);
  if (size_) check("size", *size_, {plan.batch, plan.tokens}, ScalarType::Float);
  const std::optional<Tensor> size = contiguous(size_);
  Tensor merged = torch::stable::new_empty(x, {plan.batch, plan.outputs, x.size(2)});
  Tensor merged_size = torch::stable::new_empty(x, {plan.batch, plan.outputs}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(x, {plan.batch, plan.tokens}, accumulate_in(x.scalar_type()));

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = plan.problem<T>(x, merged);
    problem.size = data_or_null<float>(size);
    problem.merged_size = mutable_data<float>(merged_size);
    problem.weight = mutable_data<cpu::Accumulate<T>>(weight);
    problem.known_weight = problem.weight;
    parallel_for(0, plan.batch, grain(16 * plan.tokens),
                 [&](int64_t begin, int64_t end) { cpu::merge_weights(problem, begin, end); });
    run_combine(problem);
  });
  return {merged, merged_size, weight};
}

Tensor combine(const Tensor& x_, const std::optional<Tensor>& weight_, const Tensor& assignment, const Tensor& kept,
               const Tensor& removed, const std::optional<Tensor>& dropped) {
  const Plan plan(assignment, kept, removed, std::nullopt, dropped);
  const Tensor x = rows_of("x", x_, plan.batch, plan.tokens);
  if (weight_) check("weight", *weight_, {plan.batch, plan.tokens}, accumulate_in(x.scalar_type()));
  const std::optional<Tensor> weight = contiguous(weight_);
  Tensor combined = torch::stable::new_empty(x, {plan.batch, plan.outputs, x.size(2)});
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = plan.problem<T>(x, combined);
    problem.known_weight = data_or_null<cpu::Accumulate<T>>(weight);
    run_combine(problem);
  });
  return combined;
}

Tensor spread(const Tensor& y_, const std::optional<Tensor>& weight_, const Tensor& assignment, const Tensor& kept,
              const Tensor& removed, const std::optional<Tensor>& dropped) {
  const Plan plan(assignment, kept, removed, std::nullopt, dropped);
  const Tensor y = rows_of("y", y_, plan.batch, plan.outputs);
  if (weight_) check("weight", *weight_, {plan.batch, plan.tokens}, accumulate_in(y.scalar_type()));
  const std::optional<Tensor> weight = contiguous(weight_);
  Tensor spread = torch::stable::new_empty(y, {plan.batch, plan.tokens, y.size(2)});
  for_type(y.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = plan.problem<T>(y, spread);
    problem.known_weight = data_or_null<cpu::Accumulate<T>>(weight);
    parallel_for(0, problem.tasks(), block_grain(problem),
                 [&](int64_t begin, int64_t end) { cpu::spread_rows(problem, begin, end); });
  });
  return spread;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("merging_merge", TORCH_BOX(&merge));
  m.impl("merging_combine", TORCH_BOX(&combine));
  m.impl("merging_spread", TORCH_BOX(&spread));
}

}  // namespace
}  // namespace mlip::bindings
