// Spectral family, filters by CUDA C++ kernels: registered in mlip_kernels_cuda.
#include "bindings/cuda/spectral.h"
#include "cuda/spectral/filtered.h"
#include "cuda/spectral/filtered_backward_weight.h"

namespace mlip::bindings::spectral {
namespace {

Tensor filtered(const Tensor& x_, const Tensor& weight_, const OptionalTensor& along_h, const Tensor& along_w,
                int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  const bool fourier = weight_.dim() == 4;
  const Matrices matrices = orthonormal(map, along_h, along_w, height, width, fourier);
  const Tensor x = with_unit_stride(x_), weight = torch::stable::contiguous(weight_);
  if (fourier) {
    check("weight", weight, {height, map.frequencies, map.channels, 2}, ScalarType::Float);
  } else {
    check("weight", weight, {height, width, map.channels}, ScalarType::Float);
  }
  map.out_tokens = x.size(1);
  Tensor y = torch::stable::new_empty(x, {map.batch, map.out_tokens, map.channels});
  if (y.numel() == 0) return y;

  map.x = tokens_of(x);
  map.weight = data<float>(weight);
  map.row_vector = reinterpret_cast<uintptr_t>(map.weight) % 16 == 0 && map.channels * (fourier ? 2 : 1) % 4 == 0;
  map.out = y.mutable_data_ptr();
  map.out_vector = rows_are_vectors(y);
  map.copy_prefix = true;
  cuda::spectral::filtered_plan(map, matrices.h, matrices.w, int(height), int(width));
  const Tensor memory = workspace(map, x, cuda::spectral::filtered_workspace(map));
  cuda::spectral::filtered_forward(map, device.stream());
  check_launch("spectral_filtered");
  return y;
}

Tensor filtered_backward_weight(const Tensor& grad_, const Tensor& x_, const OptionalTensor& along_h,
                                const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  check("grad", grad_, {map.batch, x_.size(1), map.channels}, x_.scalar_type());
  const Matrices matrices = orthonormal(map, along_h, along_w, height, width, fourier);
  const Tensor x = with_unit_stride(x_), grad = with_unit_stride(grad_);
  map.exact = true;  // the result is float32
  const int64_t pair = fourier ? 2 : 1, columns = map.frequencies;
  Tensor grad_weight = fourier ? torch::stable::new_empty(x, {height, columns, map.channels, pair}, ScalarType::Float)
                               : torch::stable::new_empty(x, {height, columns, map.channels}, ScalarType::Float);
  if (grad_weight.numel() == 0) return grad_weight;
  if (map.batch == 0) return torch::stable::zero_(grad_weight);

  map.x = tokens_of(x);
  map.second = tokens_of(grad);
  map.row_vector = map.channels * pair % 4 == 0;  // new tensors are aligned
  cuda::spectral::filtered_backward_weight_plan(map, matrices.h, matrices.w, int(height), int(width));
  const int64_t parts = map.splits > 1 ? map.splits : 0;
  Tensor partial = torch::stable::new_empty(x, {parts, grad_weight.numel()}, ScalarType::Float);
  map.partial = mutable_data<float>(parts ? partial : grad_weight);
  const Tensor memory = workspace(map, x, cuda::spectral::filtered_backward_weight_workspace(map));
  cuda::spectral::filtered_backward_weight(map, mutable_data<float>(grad_weight), device.stream());
  check_launch("spectral_filtered_backward_weight");
  return grad_weight;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("spectral_filtered", TORCH_BOX(&filtered));
  m.impl("spectral_filtered_backward_weight", TORCH_BOX(&filtered_backward_weight));
}

}  // namespace
}  // namespace mlip::bindings::spectral
