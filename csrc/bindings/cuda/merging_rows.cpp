// Merging family, CUDA C++ kernels: merging rows and copying them back. Registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/device.h"
#include "bindings/cuda/launch.h"
#include "bindings/cuda/types.h"
#include "cuda/merging/merge.h"

namespace mlip::bindings {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t MOST_TOKENS = 1 << 30;  // rows of a sample are counted in 32 bits
constexpr int64_t LARGEST_GRID = 0x7fffffff;

// The maps of a matching, checked and contiguous, and the tensors that a problem points into.
struct Plan {
  int64_t batch, tokens, outputs;
  Tensor assignment, kept, removed;
  OptionalTensor mask, dropped;

  Plan(const Tensor& assignment_, const Tensor& kept_, const Tensor& removed_, const OptionalTensor& mask_,
       const OptionalTensor& dropped_)
      : assignment(assignment_), kept(kept_), removed(removed_) {
    STD_TORCH_CHECK(assignment_.dim() == 2 && kept_.dim() == 2, "assignment, kept: expected [B, N] and [B, N']");
    batch = assignment_.size(0);
    tokens = assignment_.size(1);
    outputs = kept_.size(1);
    STD_TORCH_CHECK(tokens <= MOST_TOKENS, "assignment: expected at most ", MOST_TOKENS, " columns, got ", tokens);
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

  cuda::MergeRows problem(const Tensor& from, Tensor& to) const {
    cuda::MergeRows problem{};
    problem.type = cuda_type(from.scalar_type());
    problem.batch = batch;
    problem.tokens = int(tokens);
    problem.outputs = int(outputs);
    problem.channels = from.size(2);
    problem.vector = rows_are_vectors(from) && rows_are_vectors(to);
    problem.from = from.const_data_ptr();
    problem.stride_batch = from.stride(0);
    problem.stride_token = from.stride(1);
    problem.assignment = data<int64_t>(assignment);
    problem.kept = data<int64_t>(kept);
    problem.removed = data<int64_t>(removed);
    problem.mask = data_or_null<bool>(mask);
    problem.dropped = data_or_null<bool>(dropped);
    problem.to = to.mutable_data_ptr();
    return problem;
  }
};

// x as [B, rows, C] with unit stride.
Tensor rows_of(const char* name, const Tensor& x, int64_t batch, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected three dimensions");
  check(name, x, {batch, rows, x.size(2)}, x.scalar_type());
  return x.size(2) > 0 ? with_unit_stride(x) : torch::stable::contiguous(x);
}

void check_blocks(const char* name, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= LARGEST_GRID, name, ": more rows than one launch takes");
}

std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& x_, const OptionalTensor& size_, const Tensor& assignment,
                                         const Tensor& kept, const Tensor& removed, const OptionalTensor& mask,
                                         const OptionalTensor& dropped) {
  const OnDevice device(x_);
  const Plan plan(assignment, kept, removed, mask, dropped);
  const Tensor x = rows_of("x", x_, plan.batch, plan.tokens);
  if (size_) check("size", *size_, {plan.batch, plan.tokens}, ScalarType::Float);
  const OptionalTensor size = contiguous(size_);
  Tensor merged = torch::stable::new_empty(x, {plan.batch, plan.outputs, x.size(2)});
  Tensor merged_size = torch::stable::new_empty(x, {plan.batch, plan.outputs}, ScalarType::Float);
  Tensor weight = torch::stable::new_empty(x, {plan.batch, plan.tokens}, ScalarType::Float);

  cuda::MergeRows problem = plan.problem(x, merged);
  if (cuda::combine_blocks(problem) == 0) return {merged, merged_size, weight};
  problem.size = data_or_null<float>(size);
  problem.merged_size = mutable_data<float>(merged_size);
  problem.weight = mutable_data<float>(weight);
  check_blocks("x", cuda::combine_blocks(problem));
  cuda::merge_rows(problem, device.stream());
  check_launch("merging_merge");
  return {merged, merged_size, weight};
}

Tensor combine(const Tensor& x_, const OptionalTensor& weight_, const Tensor& assignment, const Tensor& kept,
               const Tensor& removed, const OptionalTensor& dropped) {
  const OnDevice device(x_);
  const Plan plan(assignment, kept, removed, std::nullopt, dropped);
  const Tensor x = rows_of("x", x_, plan.batch, plan.tokens);
  if (weight_) check("weight", *weight_, {plan.batch, plan.tokens}, ScalarType::Float);
  const OptionalTensor weight = contiguous(weight_);
  Tensor combined = torch::stable::new_empty(x, {plan.batch, plan.outputs, x.size(2)});

  cuda::MergeRows problem = plan.problem(x, combined);
  if (cuda::combine_blocks(problem) == 0 || problem.channels == 0) return combined;
  problem.known_weight = data_or_null<float>(weight);
  check_blocks("x", cuda::combine_blocks(problem));
  cuda::combine_rows(problem, device.stream());
  check_launch("merging_combine");
  return combined;
}

Tensor spread(const Tensor& y_, const OptionalTensor& weight_, const Tensor& assignment, const Tensor& kept,
              const Tensor& removed, const OptionalTensor& dropped) {
  const OnDevice device(y_);
  const Plan plan(assignment, kept, removed, std::nullopt, dropped);
  const Tensor y = rows_of("y", y_, plan.batch, plan.outputs);
  if (weight_) check("weight", *weight_, {plan.batch, plan.tokens}, ScalarType::Float);
  const OptionalTensor weight = contiguous(weight_);
  Tensor spread = torch::stable::new_empty(y, {plan.batch, plan.tokens, y.size(2)});

  cuda::MergeRows problem = plan.problem(y, spread);
  if (cuda::spread_blocks(problem) == 0 || problem.channels == 0) return spread;
  problem.known_weight = data_or_null<float>(weight);
  check_blocks("y", cuda::spread_blocks(problem));
  cuda::spread_rows(problem, device.stream());
  check_launch("merging_spread");
  return spread;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("merging_merge", TORCH_BOX(&merge));
  m.impl("merging_combine", TORCH_BOX(&combine));
  m.impl("merging_spread", TORCH_BOX(&spread));
}

}  // namespace
}  // namespace mlip::bindings
