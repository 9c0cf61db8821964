// Merging family, CUDA C++ kernels that merge rows and copy them back: registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/device.h"
#include "bindings/cuda/launch.h"
#include "bindings/cuda/types.h"
#include "bindings/merging_maps.h"
#include "cuda/merging/merge.h"

namespace mlip::bindings {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t LARGEST_GRID = 0x7fffffff, MOST_TOKENS = 0x7fffffff;

struct Plan : MergingMaps {
  Plan(const Tensor& assignment, const Tensor& kept, const Tensor& removed, const Optional& mask,
       const Optional& dropped)
      : MergingMaps(assignment, kept, removed, mask, dropped) {
    MLIP_CHECK(tokens <= MOST_TOKENS, "assignment: expected at most ", MOST_TOKENS, " tokens, got ", tokens);
  }

  bool empty() const { return batch == 0 || outputs == 0; }

  cuda::MergeRows problem(const Tensor& from, Tensor& to) const {
    auto problem = problem_of<cuda::MergeRows>(from);
    problem.type = cuda_type(from.scalar_type());
    problem.from = from.const_data_ptr();
    problem.to = to.mutable_data_ptr();
    problem.vector = rows_are_vectors(from) && rows_are_vectors(to);
    return problem;
  }
};

void check_grid(const char* name, const cuda::Launch& launch, const Plan& plan) {
  MLIP_CHECK(launch.grid_x <= LARGEST_GRID, name, ": ", plan.batch, " samples of ", plan.tokens,
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

  cuda::MergeRows problem = plan.problem(x, merged);
  problem.size = data_or_null<float>(size);
  problem.merged_size = mutable_data<float>(merged_size);
  problem.weight = mutable_data<float>(weight);
  check_grid("x", cuda::merge_launch(problem), plan);
  cuda::merge_rows(problem, device.stream());
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

  cuda::MergeRows problem = plan.problem(x, combined);
  problem.known_weight = data_or_null<float>(weight);
  check_grid("x", cuda::merge_launch(problem), plan);
  cuda::combine_rows(problem, device.stream());
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

  cuda::MergeRows problem = plan.problem(y, spread);
  problem.known_weight = data_or_null<float>(weight);
  check_grid("y", cuda::spread_launch(problem), plan);
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
