// Merging family, CPU key: merging rows and copying them back. The kernels themselves do not know torch.
#include <atomic>
#include <tuple>

#include "bindings/cpu/tensors.h"
#include "bindings/merging_maps.h"
#include "cpu/merging/merge.h"

namespace mlip::bindings {
namespace {

struct Plan : MergingMaps {
  using MergingMaps::MergingMaps;

  template <typename T>
  cpu::MergeRows<T> problem(const Tensor& from, Tensor& to) const {
    auto problem = problem_of<cpu::MergeRows<T>>(from);
    problem.from = data<T>(from);
    problem.to = mutable_data<T>(to);
    return problem;
  }
};

template <typename T>
int64_t block_grain(const cpu::MergeRows<T>& problem) {
  return grain(problem.block() * problem.channels);
}

// What a thread found wrong with the maps. Only the calling thread may raise an error.
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
    Fault fault;
    parallel_for(0, plan.batch, grain(16 * plan.tokens), [&](int64_t begin, int64_t end) {
      if (fault.none(cpu::merge_fault(problem, begin, end))) cpu::merge_weights(problem, begin, end);
    });
    fault.raise();
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
    Fault fault;
    parallel_for(0, plan.batch, grain(16 * plan.tokens),
                 [&](int64_t begin, int64_t end) { fault.none(cpu::merge_fault(problem, begin, end)); });
    fault.raise();
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
    Fault fault;
    parallel_for(0, problem.tasks(), block_grain(problem), [&](int64_t begin, int64_t end) {
      if (fault.none(cpu::spread_fault(problem, begin, end))) cpu::spread_rows(problem, begin, end);
    });
    fault.raise();
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
