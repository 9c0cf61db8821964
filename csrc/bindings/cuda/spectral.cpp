// Spectral family, CUDA C++ kernels: registered in mlip_kernels_cuda.
#include <tuple>

#include "bindings/cuda/device.h"
#include "cuda/spectral/spectral.h"

namespace mlip::bindings {
namespace {

namespace kernels = cuda::spectral;
using kernels::Matrix;
using kernels::SpectralProblem;
using Optional = std::optional<Tensor>;

constexpr int64_t MOST_TOKENS = 1 << 24;  // points are counted in 32 bits

// --- tensors as members of a problem ---------------------------------------------------------------------------------

// A matrix [rows, columns], or [2, rows, columns] with real and imaginary part; any strides.
Matrix matrix_of(const char* name, const Tensor& tensor, bool complex) {
  MLIP_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
  const int64_t first = complex ? 1 : 0;
  check_matrix(name, tensor, complex);
  MLIP_CHECK(tensor.size(first) < MOST_TOKENS && tensor.size(first + 1) < MOST_TOKENS, name, ": too large");
  return {data<float>(tensor),     tensor.stride(first),       tensor.stride(first + 1), complex ? tensor.stride(0) : 0,
          int(tensor.size(first)), int(tensor.size(first + 1))};
}

Matrix matrix_of(const char* name, const Optional& tensor, bool complex) {
  return tensor ? matrix_of(name, *tensor, complex) : Matrix{};
}

void check_size(const char* name, int size, int64_t expected) {
  MLIP_CHECK(size == expected, name, ": expected ", expected, " rows or columns, got ", size);
}

// Tokens [B, N, D] whose last dimension has unit stride.
kernels::Tokens tokens_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), rows_are_vectors(tensor)};
}

// What every problem with tokens x [B, prefix + height width, D] has in common; `height` is 1 on the token axis.
SpectralProblem problem_of(const Tensor& x, int64_t height, int64_t width, int64_t prefix, bool grid) {
  MLIP_CHECK(x.dim() == 3, "x: expected [B, N, D]");
  MLIP_CHECK(0 <= prefix && 0 < height && 0 < width && (grid || height == 1), "height, width: unexpected");
  MLIP_CHECK(x.size(1) == prefix + height * width && x.size(1) < MOST_TOKENS, "x: unexpected number of tokens");
  SpectralProblem problem{};
  problem.type = cuda_type(x.scalar_type());
  problem.batch = x.size(0);
  problem.channels = x.size(2);
  problem.prefix = int(prefix);
  problem.width = int(width);
  problem.exact = problem.type != cuda::Type::bfloat16;
  return problem;
}

// A problem with an orthonormal transform, cosine or Fourier: its matrices, and the sizes of its spectrum.
struct Orthonormal {
  SpectralProblem problem;
  Matrix h, w;
};

Orthonormal orthonormal(const Tensor& x, const Optional& matrix_h, const Tensor& matrix_w, int64_t height,
                        int64_t width, int64_t prefix, bool fourier) {
  SpectralProblem problem = problem_of(x, height, width, prefix, matrix_h.has_value());
  const Matrix h = matrix_of("matrix_h", matrix_h, fourier), w = matrix_of("matrix_w", matrix_w, false);
  problem.fourier = fourier;
  problem.frequencies = int(fourier ? width / 2 + 1 : width);
  problem.coefficients = int(height) * problem.frequencies;
  check_size("matrix_w", w.rows, (fourier ? 2 : 1) * problem.frequencies);
  check_size("matrix_w", w.columns, width);
  if (matrix_h) check_size("matrix_h", h.rows, height);
  if (matrix_h) check_size("matrix_h", h.columns, height);
  return {problem, h, w};
}

// New tokens [B, count, D] for the result of a problem.
Tensor new_tokens(SpectralProblem& problem, const Tensor& like, int64_t count) {
  Tensor tokens = torch::stable::new_empty(like, {problem.batch, count, problem.channels});
  problem.out_tokens = count;
  problem.out = tokens.mutable_data_ptr();
  problem.out_vector = rows_are_vectors(tokens);
  return tokens;
}

// Launches a kernel, with memory for tiles where shared memory cannot hold them.
void run(kernels::Kernel kernel, SpectralProblem& problem, const Tensor& like, const OnDevice& device,
         const char* name) {
  const int64_t bytes = kernels::workspace_bytes(kernel, problem);
  Tensor memory = torch::stable::new_empty(like, {bytes / 4}, ScalarType::Float);
  problem.workspace = bytes ? mutable_data<float>(memory) : nullptr;
  kernels::launch(kernel, problem, device.stream());
  check_launch(name);
}

// --- transforms ------------------------------------------------------------------------------------------------------

Tensor separable(const Tensor& x_, const Optional& matrix_h, const Tensor& matrix_w, int64_t height, int64_t width,
                 int64_t prefix) {
  const OnDevice device(x_);
  SpectralProblem problem = problem_of(x_, height, width, prefix, matrix_h.has_value());
  const Matrix h = matrix_of("matrix_h", matrix_h, false), w = matrix_of("matrix_w", matrix_w, false);
  check_size("matrix_w", w.columns, width);
  if (matrix_h) check_size("matrix_h", h.columns, height);
  const Tensor x = with_unit_stride(x_);
  Tensor y = new_tokens(problem, x, prefix + (matrix_h ? h.rows : height) * int64_t(w.rows));
  if (y.numel() == 0) return y;

  problem.x = tokens_of(x);
  problem.copy_prefix = true;
  const auto kernel = kernels::separable(problem, h, w, int(height), int(width));
  run(kernel, problem, x, device, "spectral_separable");
  return y;
}

std::tuple<Tensor, Tensor> analysis(const Tensor& x_, const Optional& matrix_h, const Tensor& matrix_w, int64_t height,
                                    int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  SpectralProblem problem = problem_of(x_, height, width, prefix, matrix_h.has_value());
  problem.fourier = true;
  const Matrix h = matrix_of("matrix_h", matrix_h, true), w = matrix_of("matrix_w", matrix_w, false);
  check_size("matrix_w", w.columns, width);
  if (matrix_h) check_size("matrix_h", h.columns, height);
  MLIP_CHECK(w.rows % 2 == 0, "matrix_w: expected real and imaginary parts");
  const Tensor x = with_unit_stride(x_);
  const int64_t rows = matrix_h ? h.rows : height;
  problem.frequencies = w.rows / 2;
  problem.coefficients = int(rows * problem.frequencies);
  Tensor real = torch::stable::new_empty(x, {problem.batch, rows, problem.frequencies, problem.channels});
  Tensor imaginary = torch::stable::new_empty(x, {problem.batch, rows, problem.frequencies, problem.channels});
  if (real.numel() == 0) return {real, imaginary};

  problem.x = tokens_of(x);
  problem.out = real.mutable_data_ptr();
  problem.out_imaginary = imaginary.mutable_data_ptr();
  problem.out_vector = rows_are_vectors(real) && rows_are_vectors(imaginary);
  const auto kernel = kernels::analysis(problem, h, w, int(height), int(width));
  run(kernel, problem, x, device, "spectral_analysis");
  return {real, imaginary};
}

// A spectrum [B, H, K, D] as tokens of which the last dimension has unit stride and the rows follow one another.
Tensor as_rows(const Tensor& spectrum) {
  const bool rows = spectrum.size(1) == 1 || spectrum.stride(1) == spectrum.size(2) * spectrum.stride(2);
  return rows ? with_unit_stride(spectrum) : torch::stable::contiguous(spectrum);
}

Tensor synthesis(const Tensor& real_, const Tensor& imaginary_, const Optional& matrix_h, const Tensor& matrix_w,
                 int64_t prefix) {
  MLIP_CHECK(real_.dim() == 4, "real: expected [B, H, K, D]");
  const int64_t batch = real_.size(0), height = real_.size(1), frequencies = real_.size(2), channels = real_.size(3);
  MLIP_CHECK(height >= 1 && frequencies >= 1, "real: expected [B, H, K, D] with H, K >= 1, got ", height, " and ",
             frequencies);
  check("imaginary", imaginary_, {batch, height, frequencies, channels}, real_.scalar_type());
  MLIP_CHECK(0 <= prefix && (matrix_h || height == 1), "real: unexpected shape");
  MLIP_CHECK(height * frequencies < MOST_TOKENS, "real: too many coefficients");
  const OnDevice device(real_);
  const Matrix h = matrix_of("matrix_h", matrix_h, true), w = matrix_of("matrix_w", matrix_w, false);
  check_size("matrix_w", w.columns, 2 * frequencies);
  if (matrix_h) check_size("matrix_h", h.columns, height);
  const Tensor real = as_rows(real_), imaginary = as_rows(imaginary_);
  SpectralProblem problem{};
  problem.type = cuda_type(real.scalar_type());
  problem.batch = batch;
  problem.channels = channels;
  problem.prefix = int(prefix);
  problem.fourier = true;
  problem.exact = problem.type != cuda::Type::bfloat16;
  Tensor x = new_tokens(problem, real, prefix + (matrix_h ? h.rows : height) * int64_t(w.rows));
  if (x.numel() == 0) return x;

  problem.x = {real.const_data_ptr(), real.stride(0), real.stride(2), rows_are_vectors(real)};
  problem.second = {imaginary.const_data_ptr(), imaginary.stride(0), imaginary.stride(2), rows_are_vectors(imaginary)};
  const auto kernel = kernels::synthesis(problem, h, w, int(height), int(frequencies));
  run(kernel, problem, x, device, "spectral_synthesis");
  return x;
}

// --- filters ---------------------------------------------------------------------------------------------------------

Tensor filtered(const Tensor& x_, const Tensor& weight_, const Optional& matrix_h, const Tensor& matrix_w,
                int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  const bool fourier = weight_.dim() == 4;
  auto [problem, h, w] = orthonormal(x_, matrix_h, matrix_w, height, width, prefix, fourier);
  const Tensor x = with_unit_stride(x_), weight = torch::stable::contiguous(weight_);
  if (fourier) {
    check("weight", weight, {height, problem.frequencies, problem.channels, 2}, ScalarType::Float);
  } else {
    check("weight", weight, {height, width, problem.channels}, ScalarType::Float);
  }
  Tensor y = new_tokens(problem, x, x.size(1));
  if (y.numel() == 0) return y;

  problem.x = tokens_of(x);
  problem.weight = data<float>(weight);
  problem.row_vector =
      reinterpret_cast<uintptr_t>(problem.weight) % 16 == 0 && problem.channels * (fourier ? 2 : 1) % 4 == 0;
  problem.copy_prefix = true;
  const auto kernel = kernels::filtered(problem, h, w, int(height), int(width));
  run(kernel, problem, x, device, "spectral_filtered");
  return y;
}

Tensor filtered_backward_weight(const Tensor& grad_, const Tensor& x_, const Optional& matrix_h, const Tensor& matrix_w,
                                int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const OnDevice device(x_);
  auto [problem, h, w] = orthonormal(x_, matrix_h, matrix_w, height, width, prefix, fourier);
  check("grad", grad_, {problem.batch, x_.size(1), problem.channels}, x_.scalar_type());
  const Tensor x = with_unit_stride(x_), grad = with_unit_stride(grad_);
  problem.exact = true;  // the result is float32
  const int64_t parts = fourier ? 2 : 1, columns = problem.frequencies;
  Tensor grad_weight = fourier
                           ? torch::stable::new_empty(x, {height, columns, problem.channels, parts}, ScalarType::Float)
                           : torch::stable::new_empty(x, {height, columns, problem.channels}, ScalarType::Float);
  if (grad_weight.numel() == 0) return grad_weight;
  if (problem.batch == 0) return torch::stable::zero_(grad_weight);

  problem.x = tokens_of(x);
  problem.second = tokens_of(grad);
  problem.row_vector = problem.channels * parts % 4 == 0;  // new tensors are aligned
  const auto kernel = kernels::filtered_backward_weight(problem, h, w, int(height), int(width));
  const int64_t splits = problem.splits > 1 ? problem.splits : 0;
  Tensor partial = torch::stable::new_empty(x, {splits, grad_weight.numel()}, ScalarType::Float);
  problem.partial = mutable_data<float>(splits ? partial : grad_weight);
  run(kernel, problem, x, device, "spectral_filtered_backward_weight");
  kernels::add_weight_gradients(problem, mutable_data<float>(grad_weight), device.stream());
  check_launch("spectral_filtered_backward_weight");
  return grad_weight;
}

// --- energies --------------------------------------------------------------------------------------------------------

Tensor band_energy(const Tensor& x_, const Tensor& bands_, int64_t count, const Optional& matrix_h,
                   const Tensor& matrix_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const OnDevice device(x_);
  auto [problem, h, w] = orthonormal(x_, matrix_h, matrix_w, height, width, prefix, fourier);
  check("bands", bands_, {problem.coefficients}, ScalarType::Int);
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  Tensor energy = torch::stable::new_empty(x, {problem.batch, count, problem.channels});
  if (energy.numel() == 0) return energy;

  problem.x = tokens_of(x);
  problem.bands = data<int>(bands);
  problem.band_count = count;
  problem.out = energy.mutable_data_ptr();
  const auto kernel = kernels::band_energy(problem, h, w, int(height), int(width));
  run(kernel, problem, x, device, "spectral_band_energy");
  return energy;
}

Tensor band_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& bands_, const Optional& matrix_h,
                            const Tensor& matrix_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const OnDevice device(x_);
  auto [problem, h, w] = orthonormal(x_, matrix_h, matrix_w, height, width, prefix, fourier);
  check("bands", bands_, {problem.coefficients}, ScalarType::Int);
  MLIP_CHECK(grad_.dim() == 3, "grad: expected [B, bands, D]");
  check("grad", grad_, {problem.batch, grad_.size(1), problem.channels}, x_.scalar_type());
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor grad_x = new_tokens(problem, x, x.size(1));
  if (grad_x.numel() == 0) return grad_x;

  problem.x = tokens_of(x);
  problem.bands = data<int>(bands);
  problem.band_count = grad.size(1);
  problem.grad = grad.const_data_ptr();
  problem.row_vector = rows_are_vectors(grad);
  const auto kernel = kernels::band_energy_backward(problem, h, w, int(height), int(width));
  run(kernel, problem, x, device, "spectral_band_energy_backward");
  return grad_x;
}

// A frequency mask is [H, W] (cosine) or [H, K, 1] (Fourier).
void check_frequency_mask(const SpectralProblem& problem, const Tensor& mask, int64_t height) {
  if (problem.fourier) {
    check("frequency_mask", mask, {height, problem.frequencies, 1}, ScalarType::Float);
  } else {
    check("frequency_mask", mask, {height, problem.frequencies}, ScalarType::Float);
  }
}

Tensor token_energy(const Tensor& x_, const Tensor& mask_, const Optional& matrix_h, const Tensor& matrix_w,
                    int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  auto [problem, h, w] = orthonormal(x_, matrix_h, matrix_w, height, width, prefix, mask_.dim() == 3);
  check_frequency_mask(problem, mask_, height);
  const Tensor x = with_unit_stride(x_), mask = torch::stable::contiguous(mask_);
  problem.exact = true;  // the result is float32
  problem.out_tokens = x.size(1);
  Tensor energy = torch::stable::new_empty(x, {problem.batch, problem.out_tokens}, ScalarType::Float);
  if (energy.numel() == 0) return energy;

  problem.x = tokens_of(x);
  problem.frequency_mask = data<float>(mask);
  const auto kernel = kernels::token_energy(problem, h, w, int(height), int(width));
  Tensor partial = torch::stable::new_empty(
      x, {kernels::column_blocks(problem), problem.batch, problem.out_tokens - prefix}, ScalarType::Float);
  problem.partial = mutable_data<float>(partial);
  run(kernel, problem, x, device, "spectral_token_energy");
  kernels::add_token_energies(problem, mutable_data<float>(energy), device.stream());
  check_launch("spectral_token_energy");
  return energy;
}

Tensor token_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& mask_, const Optional& matrix_h,
                             const Tensor& matrix_w, int64_t height, int64_t width, int64_t prefix) {
  const OnDevice device(x_);
  auto [problem, h, w] = orthonormal(x_, matrix_h, matrix_w, height, width, prefix, mask_.dim() == 3);
  check_frequency_mask(problem, mask_, height);
  check("grad", grad_, {problem.batch, x_.size(1)}, ScalarType::Float);
  const Tensor x = with_unit_stride(x_), mask = torch::stable::contiguous(mask_);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor grad_x = new_tokens(problem, x, x.size(1));
  if (grad_x.numel() == 0) return grad_x;

  problem.x = tokens_of(x);
  problem.frequency_mask = data<float>(mask);
  problem.grad = grad.const_data_ptr();
  const auto kernel = kernels::token_energy_backward(problem, h, w, int(height), int(width));
  run(kernel, problem, x, device, "spectral_token_energy_backward");
  return grad_x;
}

MLIP_CUDA_KERNELS(m) {
  m.impl("spectral_separable", TORCH_BOX(&separable));
  m.impl("spectral_analysis", TORCH_BOX(&analysis));
  m.impl("spectral_synthesis", TORCH_BOX(&synthesis));
  m.impl("spectral_filtered", TORCH_BOX(&filtered));
  m.impl("spectral_filtered_backward_weight", TORCH_BOX(&filtered_backward_weight));
  m.impl("spectral_band_energy", TORCH_BOX(&band_energy));
  m.impl("spectral_band_energy_backward", TORCH_BOX(&band_energy_backward));
  m.impl("spectral_token_energy", TORCH_BOX(&token_energy));
  m.impl("spectral_token_energy_backward", TORCH_BOX(&token_energy_backward));
}

}  // namespace
}  // namespace mlip::bindings
