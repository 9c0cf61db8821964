// Spectral family, linear maps by CUDA C++ kernels: registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/spectral.h"
#include "cuda/spectral/analysis.h"
#include "cuda/spectral/separable.h"
#include "cuda/spectral/synthesis.h"

namespace mlip::bindings::spectral {
namespace {

Tensor separable(const Tensor& x_, const OptionalTensor& along_h, const Tensor& along_w, int64_t height, int64_t width,
                 int64_t prefix) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  const Matrix h = matrix_of("along_h", along_h, false), w = matrix_of("along_w", along_w, false);
  check_size("along_w", w.columns, width);
  if (along_h) check_size("along_h", h.columns, height);
  const Tensor x = with_unit_stride(x_);
  map.out_tokens = prefix + (along_h ? h.rows : height) * int64_t(w.rows);
  Tensor y = torch::stable::new_empty(x, {map.batch, map.out_tokens, map.channels});
  if (y.numel() == 0) return y;

  map.x = tokens_of(x);
  map.out = y.mutable_data_ptr();
  map.out_vector = rows_are_vectors(y);
  map.copy_prefix = true;
  cuda::spectral::separable_plan(map, h, w, int(height), int(width));
  const Tensor memory = workspace(map, x, cuda::spectral::separable_workspace(map));
  cuda::spectral::separable_forward(map, device.stream());
  check_launch("spectral_separable");
  return y;
}

std::tuple<Tensor, Tensor> analysis(const Tensor& x_, const OptionalTensor& along_h, const Tensor& along_w,
                                    int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  Map map = map_of(x_, height, width, prefix, along_h.has_value());
  map.fourier = true;
  const Matrix h = matrix_of("along_h", along_h, true), w = matrix_of("along_w", along_w, false);
  check_size("along_w", w.columns, width);
  if (along_h) check_size("along_h", h.columns, height);
  MLIP_CHECK(w.rows % 2 == 0, "along_w: expected real and imaginary parts");
  const Tensor x = with_unit_stride(x_);
  const int64_t rows = along_h ? h.rows : height;
  map.frequencies = w.rows / 2;
  map.coefficients = int(rows * map.frequencies);
  Tensor real = torch::stable::new_empty(x, {map.batch, rows, map.frequencies, map.channels});
  Tensor imaginary = torch::stable::new_empty(x, {map.batch, rows, map.frequencies, map.channels});
  if (real.numel() == 0) return {real, imaginary};

  map.x = tokens_of(x);
  map.out = real.mutable_data_ptr();
  map.out_imaginary = imaginary.mutable_data_ptr();
  map.out_vector = rows_are_vectors(real) && rows_are_vectors(imaginary);
  cuda::spectral::analysis_plan(map, h, w, int(height), int(width));
  const Tensor memory = workspace(map, x, cuda::spectral::analysis_workspace(map));
  cuda::spectral::analysis_forward(map, device.stream());
  check_launch("spectral_analysis");
  return {real, imaginary};
}

// A spectrum [B, H, K, D] as tokens of which the last dimension has unit stride and the rows follow one another.
Tensor as_rows(const Tensor& spectrum) {
  const bool rows = spectrum.size(1) == 1 || spectrum.stride(1) == spectrum.size(2) * spectrum.stride(2);
  return rows ? with_unit_stride(spectrum) : torch::stable::contiguous(spectrum);
}

Tensor synthesis(const Tensor& real_, const Tensor& imaginary_, const OptionalTensor& along_h, const Tensor& along_w,
                 int64_t prefix) {
  MLIP_CHECK(real_.dim() == 4, "real: expected [B, H, K, D]");
  const int64_t batch = real_.size(0), height = real_.size(1), frequencies = real_.size(2), channels = real_.size(3);
  MLIP_CHECK(height >= 1 && frequencies >= 1, "real: expected [B, H, K, D] with H, K >= 1, got ", height, " and ",
             frequencies);
  check("imaginary", imaginary_, {batch, height, frequencies, channels}, real_.scalar_type());
  MLIP_CHECK(0 <= prefix && (along_h || height == 1), "real: unexpected shape");
  MLIP_CHECK(height * frequencies < MOST_TOKENS, "real: too many coefficients");
  const OnDevice device(real_);
  const Matrix h = matrix_of("along_h", along_h, true), w = matrix_of("along_w", along_w, false);
  check_size("along_w", w.columns, 2 * frequencies);
  if (along_h) check_size("along_h", h.columns, height);
  const Tensor real = as_rows(real_), imaginary = as_rows(imaginary_);
  Map map{};
  map.type = cuda_type(real.scalar_type());
  map.batch = batch;
  map.channels = channels;
  map.prefix = int(prefix);
  map.fourier = true;
  map.exact = map.type != cuda::Type::bfloat16;
  map.out_tokens = prefix + (along_h ? h.rows : height) * int64_t(w.rows);
  Tensor x = torch::stable::new_empty(real, {batch, map.out_tokens, channels});
  if (x.numel() == 0) return x;

  map.x = {real.const_data_ptr(), real.stride(0), real.stride(2), rows_are_vectors(real)};
  map.second = {imaginary.const_data_ptr(), imaginary.stride(0), imaginary.stride(2), rows_are_vectors(imaginary)};
  map.out = x.mutable_data_ptr();
  map.out_vector = rows_are_vectors(x);
  cuda::spectral::synthesis_plan(map, h, w, int(height), int(frequencies));
  const Tensor memory = workspace(map, x, cuda::spectral::synthesis_workspace(map));
  cuda::spectral::synthesis_forward(map, device.stream());
  check_launch("spectral_synthesis");
  return x;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("spectral_separable", TORCH_BOX(&separable));
  m.impl("spectral_analysis", TORCH_BOX(&analysis));
  m.impl("spectral_synthesis", TORCH_BOX(&synthesis));
}

}  // namespace
}  // namespace mlip::bindings::spectral
