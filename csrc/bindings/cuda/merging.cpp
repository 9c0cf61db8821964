// Merging family, CUDA C++ kernels: registered in mlip_kernels_cuda, from where mlip_kernels chooses between them and
// Triton.
#include <tuple>

#include "bindings/cuda/device.h"
#include "bindings/cuda/launch.h"
#include "bindings/cuda/types.h"
#include "cuda/merging/weighted_mean.h"

namespace mlip::bindings {
namespace {

cuda::WeightedMean weighted_mean_problem(ScalarType type, int64_t batch, int64_t tokens, int64_t channels,
                                         int64_t prefix, const std::optional<Tensor>& weight) {
  cuda::WeightedMean problem{};
  problem.type = cuda_type(type);
  problem.batch = batch;
  problem.tokens = tokens;
  problem.channels = channels;
  problem.prefix = prefix;
  problem.weight = data_or_null<float>(weight);
  return problem;
}

std::tuple<Tensor, Tensor> weighted_mean(const Tensor& x_, const std::optional<Tensor>& weight_, int64_t prefix) {
  MLIP_CHECK(x_.dim() == 3, "x: expected [B, N, D]");
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  check_prefix(prefix, tokens);
  if (weight_) check("weight", *weight_, {batch, tokens}, ScalarType::Float);
  const OnDevice device(x_);
  const Tensor x = with_unit_stride(x_);
  const std::optional<Tensor> weight = contiguous(weight_);
  Tensor mean = torch::stable::new_empty(x, {batch, channels});
  Tensor total = torch::stable::new_empty(x, {batch}, ScalarType::Float);
  if (batch == 0) return {mean, total};

  cuda::WeightedMean problem = weighted_mean_problem(x.scalar_type(), batch, tokens, channels, prefix, weight);
  problem.x = x.const_data_ptr();
  problem.stride_batch = x.stride(0);
  problem.stride_token = x.stride(1);
  problem.mean = mean.mutable_data_ptr();
  problem.total = mutable_data<float>(total);
  problem.vector = rows_are_vectors(x);
  problem.splits = cuda::weighted_mean_splits(problem.type, batch, tokens - prefix, channels);
  const int64_t parts = problem.splits > 1 ? problem.splits : 0;
  Tensor partial = torch::stable::new_empty(x, {parts, batch, channels}, ScalarType::Float);
  Tensor partial_total = torch::stable::new_empty(x, {parts, batch}, ScalarType::Float);
  problem.partial = mutable_data<float>(partial);
  problem.partial_total = mutable_data<float>(partial_total);
  cuda::weighted_mean_forward(problem, device.stream());
  check_launch("merging_weighted_mean");
  return {mean, total};
}

Tensor weighted_mean_backward(const Tensor& grad_, const std::optional<Tensor>& weight_, const Tensor& total_,
                              int64_t tokens, int64_t prefix) {
  MLIP_CHECK(grad_.dim() == 2, "grad: expected [B, D]");
  const int64_t batch = grad_.size(0), channels = grad_.size(1);
  check_prefix(prefix, tokens);
  check("total", total_, {batch}, ScalarType::Float);
  if (weight_) check("weight", *weight_, {batch, tokens}, ScalarType::Float);
  const OnDevice device(grad_);
  const Tensor grad = torch::stable::contiguous(grad_), total = torch::stable::contiguous(total_);
  const std::optional<Tensor> weight = contiguous(weight_);
  Tensor grad_x = torch::stable::new_empty(grad, {batch, tokens, channels});
  if (batch == 0) return grad_x;

  cuda::WeightedMean problem = weighted_mean_problem(grad.scalar_type(), batch, tokens, channels, prefix, weight);
  problem.grad = grad.const_data_ptr();
  problem.known_total = data<float>(total);
  problem.grad_x = grad_x.mutable_data_ptr();
  problem.vector = rows_are_vectors(grad) && rows_are_vectors(grad_x);
  cuda::weighted_mean_backward(problem, device.stream());
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

  cuda::WeightedMean problem = weighted_mean_problem(x.scalar_type(), batch, tokens, channels, prefix, weight);
  problem.x = x.const_data_ptr();
  problem.stride_batch = x.stride(0);
  problem.stride_token = x.stride(1);
  problem.grad = grad.const_data_ptr();
  problem.known_total = data<float>(total);
  problem.grad_weight = mutable_data<float>(grad_weight);
  problem.vector = rows_are_vectors(x) && rows_are_vectors(grad);
  cuda::weighted_mean_backward_weight(problem, device.stream());
  check_launch("merging_weighted_mean_backward_weight");
  return grad_weight;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("merging_weighted_mean", TORCH_BOX(&weighted_mean));
  m.impl("merging_weighted_mean_backward", TORCH_BOX(&weighted_mean_backward));
  m.impl("merging_weighted_mean_backward_weight", TORCH_BOX(&weighted_mean_backward_weight));
}

}  // namespace
}  // namespace mlip::bindings
