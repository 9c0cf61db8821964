// Merging family, CPU key: checks, allocation, threads. The kernels themselves do not know torch.
#include <tuple>

#include "bindings/cpu/tensors.h"
#include "cpu/merging/weighted_mean.h"

namespace mlip::bindings {
namespace {

template <typename T>
cpu::WeightedMean<T> weighted_mean_problem(int64_t batch, int64_t tokens, int64_t channels, int64_t prefix,
                                           const std::optional<Tensor>& weight) {
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

std::tuple<Tensor, Tensor> weighted_mean(const Tensor& x_, const std::optional<Tensor>& weight_, int64_t prefix) {
  MLIP_CHECK(x_.dim() == 3, "x: expected [B, N, D]");
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  const ScalarType wide = accumulate_in(x_.scalar_type());
  check_prefix(prefix, tokens);
  if (weight_) check("weight", *weight_, {batch, tokens}, wide);
  const Tensor x = with_unit_stride(x_);
  const std::optional<Tensor> weight = contiguous(weight_);
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

Tensor weighted_mean_backward(const Tensor& grad_, const std::optional<Tensor>& weight_, const Tensor& total_,
                              int64_t tokens, int64_t prefix) {
  MLIP_CHECK(grad_.dim() == 2, "grad: expected [B, D]");
  const int64_t batch = grad_.size(0), channels = grad_.size(1);
  const ScalarType wide = accumulate_in(grad_.scalar_type());
  check_prefix(prefix, tokens);
  check("total", total_, {batch}, wide);
  if (weight_) check("weight", *weight_, {batch, tokens}, wide);
  const Tensor grad = torch::stable::contiguous(grad_), total = torch::stable::contiguous(total_);
  const std::optional<Tensor> weight = contiguous(weight_);
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
  m.impl("merging_weighted_mean", TORCH_BOX(&weighted_mean));
  m.impl("merging_weighted_mean_backward", TORCH_BOX(&weighted_mean_backward));
  m.impl("merging_weighted_mean_backward_weight", TORCH_BOX(&weighted_mean_backward_weight));
}

}  // namespace
}  // namespace mlip::bindings
