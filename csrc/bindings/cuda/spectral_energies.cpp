// Spectral family, energies by CUDA C++ kernels: registered in mlip_kernels_cuda.
#include "bindings/cuda/spectral.h"
#include "cuda/spectral/band_energy.h"
#include "cuda/spectral/token_energy.h"

namespace mlip::bindings::spectral {
namespace {

Tensor band_energy(const Tensor& x_, const Tensor& bands_, int64_t count, const OptionalTensor& along_h,
                   const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  const Matrices matrices = orthonormal(map, along_h, along_w, height, width, fourier);
  check("bands", bands_, {map.coefficients}, ScalarType::Int);
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  Tensor energy = torch::stable::new_empty(x, {map.batch, count, map.channels});
  if (energy.numel() == 0) return energy;

  map.x = tokens_of(x);
  map.bands = data<int>(bands);
  map.count = count;
  map.out = energy.mutable_data_ptr();
  cuda::spectral::band_energy_plan(map, matrices.h, matrices.w, int(height), int(width));
  const Tensor memory = workspace(map, x, cuda::spectral::band_energy_workspace(map));
  cuda::spectral::band_energy_forward(map, device.stream());
  check_launch("spectral_band_energy");
  return energy;
}

Tensor band_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& bands_, const OptionalTensor& along_h,
                            const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  const Matrices matrices = orthonormal(map, along_h, along_w, height, width, fourier);
  check("bands", bands_, {map.coefficients}, ScalarType::Int);
  MLIP_CHECK(grad_.dim() == 3, "grad: expected [B, bands, D]");
  check("grad", grad_, {map.batch, grad_.size(1), map.channels}, x_.scalar_type());
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  const Tensor grad = torch::stable::contiguous(grad_);
  map.out_tokens = x.size(1);
  Tensor grad_x = torch::stable::new_empty(x, {map.batch, map.out_tokens, map.channels});
  if (grad_x.numel() == 0) return grad_x;

  map.x = tokens_of(x);
  map.bands = data<int>(bands);
  map.count = grad.size(1);
  map.grad = grad.const_data_ptr();
  map.row_vector = rows_are_vectors(grad);
  map.out = grad_x.mutable_data_ptr();
  map.out_vector = rows_are_vectors(grad_x);
  cuda::spectral::band_energy_backward_plan(map, matrices.h, matrices.w, int(height), int(width));
  const Tensor memory = workspace(map, x, cuda::spectral::band_energy_backward_workspace(map));
  cuda::spectral::band_energy_backward(map, device.stream());
  check_launch("spectral_band_energy_backward");
  return grad_x;
}

// The coefficients that stay: [H, W] (cosine) or [H, K, 1] (Fourier).
void check_kept(const Map& map, const Tensor& kept, int64_t height) {
  if (map.fourier) {
    check("kept", kept, {height, map.frequencies, 1}, ScalarType::Float);
  } else {
    check("kept", kept, {height, map.frequencies}, ScalarType::Float);
  }
}

Tensor token_energy(const Tensor& x_, const Tensor& kept_, const OptionalTensor& along_h, const Tensor& along_w,
                    int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  const Matrices matrices = orthonormal(map, along_h, along_w, height, width, kept_.dim() == 3);
  check_kept(map, kept_, height);
  const Tensor x = with_unit_stride(x_), kept = torch::stable::contiguous(kept_);
  map.exact = true;  // the result is float32
  map.out_tokens = x.size(1);
  Tensor energy = torch::stable::new_empty(x, {map.batch, map.out_tokens}, ScalarType::Float);
  if (energy.numel() == 0) return energy;

  map.x = tokens_of(x);
  map.factor = data<float>(kept);
  cuda::spectral::token_energy_plan(map, matrices.h, matrices.w, int(height), int(width));
  Tensor partial = torch::stable::new_empty(x, {cuda::spectral::column_blocks(map), map.batch, map.out_tokens - prefix},
                                            ScalarType::Float);
  map.partial = mutable_data<float>(partial);
  const Tensor memory = workspace(map, x, cuda::spectral::token_energy_workspace(map));
  cuda::spectral::token_energy_forward(map, mutable_data<float>(energy), device.stream());
  check_launch("spectral_token_energy");
  return energy;
}

Tensor token_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& kept_, const OptionalTensor& along_h,
                             const Tensor& along_w, int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  const Matrices matrices = orthonormal(map, along_h, along_w, height, width, kept_.dim() == 3);
  check_kept(map, kept_, height);
  check("grad", grad_, {map.batch, x_.size(1)}, ScalarType::Float);
  const Tensor x = with_unit_stride(x_), kept = torch::stable::contiguous(kept_);
  const Tensor grad = torch::stable::contiguous(grad_);
  map.out_tokens = x.size(1);
  Tensor grad_x = torch::stable::new_empty(x, {map.batch, map.out_tokens, map.channels});
  if (grad_x.numel() == 0) return grad_x;

  map.x = tokens_of(x);
  map.factor = data<float>(kept);
  map.grad = grad.const_data_ptr();
  map.out = grad_x.mutable_data_ptr();
  map.out_vector = rows_are_vectors(grad_x);
  cuda::spectral::token_energy_backward_plan(map, matrices.h, matrices.w, int(height), int(width));
  const Tensor memory = workspace(map, x, cuda::spectral::token_energy_backward_workspace(map));
  cuda::spectral::token_energy_backward(map, device.stream());
  check_launch("spectral_token_energy_backward");
  return grad_x;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("spectral_band_energy", TORCH_BOX(&band_energy));
  m.impl("spectral_band_energy_backward", TORCH_BOX(&band_energy_backward));
  m.impl("spectral_token_energy", TORCH_BOX(&token_energy));
  m.impl("spectral_token_energy_backward", TORCH_BOX(&token_energy_backward));
}

}  // namespace
}  // namespace mlip::bindings::spectral
