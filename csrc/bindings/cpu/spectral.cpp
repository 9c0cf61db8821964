// Spectral family, CPU key: checks, allocation, threads. The kernels themselves do not know torch.
#include <cmath>
#include <limits>
#include <tuple>

#include "bindings/cpu/tensors.h"
#include "cpu/spectral/energy.h"
#include "cpu/spectral/filter.h"
#include "cpu/spectral/grid_transform.h"

namespace mlip::bindings {
namespace {

using Optional = std::optional<Tensor>;

// How every operator of the family describes tokens [B, prefix + height * width, D] and its matrices, in the dtype that
// tokens accumulate in: matrix_w [W', columns], matrix_h [H', height], or [2, H', height] where it is complex.
struct Axes {
  const Optional& matrix_h;
  const Tensor& matrix_w;
  int64_t height, width, prefix;
};

void check_axis(const char* name, const Tensor& tensor, bool complex, int64_t columns, ScalarType type) {
  check_matrix(name, tensor, complex);
  MLIP_CHECK(tensor.size(-1) == columns, name, ": expected ", columns, " columns, got ", tensor.size(-1));
  MLIP_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", type, ", got ", tensor.scalar_type());
}

void check_tokens(const Tensor& x, const Axes& axes, bool complex) {
  MLIP_CHECK(x.dim() == 3, "x: expected [B, N, D]");
  MLIP_CHECK(
      axes.prefix >= 0 && axes.height >= 1 && axes.width >= 1 && x.size(1) == axes.prefix + axes.height * axes.width,
      "x: expected prefix_tokens + height * width tokens, got ", x.size(1));
  const ScalarType wide = accumulate_in(x.scalar_type());
  if (axes.matrix_h) check_axis("matrix_h", *axes.matrix_h, complex, axes.height, wide);
  check_axis("matrix_w", axes.matrix_w, false, axes.width, wide);
}

// Tokens, and the square matrices of an orthonormal transform.
void check_spectrum(const Tensor& x, const Axes& axes, bool fourier) {
  check_tokens(x, axes, fourier);
  if (axes.matrix_h) MLIP_CHECK(axes.matrix_h->size(-2) == axes.height, "matrix_h: expected ", axes.height, " rows");
  const int64_t rows = fourier ? 2 * (axes.width / 2 + 1) : axes.width;
  MLIP_CHECK(axes.matrix_w.size(0) == rows, "matrix_w: expected ", rows, " rows, got ", axes.matrix_w.size(0));
}

// A matrix [M, N] with any strides, or the real or imaginary part of [2, M, N].
template <typename A>
cpu::Matrix<A> matrix(const Tensor& tensor, int64_t part = 0) {
  const int64_t first = tensor.dim() - 2;
  return {data<A>(tensor) + (first ? part * tensor.stride(0) : 0), tensor.size(first), tensor.size(first + 1),
          tensor.stride(first), tensor.stride(first + 1)};
}

// Rows [first, first + rows) of a matrix.
template <typename A>
cpu::Matrix<A> rows_of(cpu::Matrix<A> m, int64_t first, int64_t rows) {
  m.data += first * m.stride_row, m.rows = rows;
  return m;
}

template <typename A>
cpu::Matrix<A> transposed(const cpu::Matrix<A>& m) {
  return {m.data, m.columns, m.rows, m.stride_column, m.stride_row};
}

template <typename A>
cpu::AxisTransform<A> axis_transform(const Optional& tensor, bool complex) {
  if (!tensor) return {};
  if (!complex) return cpu::AxisTransform<A>(matrix<A>(*tensor));
  return cpu::AxisTransform<A>(matrix<A>(*tensor, 0), matrix<A>(*tensor, 1));
}

// Shares tasks of so many elements among torch's threads.
template <typename Problem>
void run(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& problem, int64_t tasks, int64_t elements) {
  parallel_for(0, tasks, grain(elements), [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

// Linear transforms.

// Tokens [B, prefix + height * width, D].
template <typename T>
cpu::Grid<T> tokens_grid(T* first, int64_t stride_batch, int64_t stride_token, int64_t height, int64_t width,
                         int64_t prefix) {
  return {first + prefix * stride_token, nullptr, height, width, stride_batch, width * stride_token, stride_token};
}

template <typename T>
void run_transform(cpu::GridTransform<T>& problem, const Tensor& x, const Optional& matrix_h, const Tensor& matrix_w,
                   bool complex) {
  using A = cpu::Accumulate<T>;
  problem.batch = x.size(0), problem.channels = x.size(-1);
  problem.matrix_h = axis_transform<A>(matrix_h, complex), problem.matrix_w = axis_transform<A>(matrix_w, false);
  run(&cpu::grid_transform<T>, problem, problem.tasks(), problem.positions() * cpu::BLOCK_CHANNELS);
}

int64_t check_separable(const Tensor& x, const Axes& axes) {
  check_tokens(x, axes, false);
  return axes.prefix + (axes.matrix_h ? axes.matrix_h->size(0) : axes.height) * axes.matrix_w.size(0);
}

void write_separable(const Tensor& x_, const Axes& axes, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = with_unit_stride(x_);
  const int64_t tokens = y.size(1), channels = y.size(2), new_width = axes.matrix_w.size(0);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cpu::GridTransform<T> problem{};
    problem.prefix = axes.prefix;
    problem.x = tokens_grid(data<T>(x), x.stride(0), x.stride(1), axes.height, axes.width, axes.prefix);
    problem.y = tokens_grid(mutable_data<T>(y), tokens * channels, channels, (tokens - axes.prefix) / new_width,
                            new_width, axes.prefix);
    run_transform(problem, x, axes.matrix_h, axes.matrix_w, false);
  });
}

Tensor separable(const Tensor& x, const Optional& matrix_h, const Tensor& matrix_w, int64_t height, int64_t width,
                 int64_t prefix) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  const int64_t tokens = check_separable(x, axes);
  Tensor y = torch::stable::new_empty(x, {x.size(0), tokens, x.size(2)});
  write_separable(x, axes, y);
  return y;
}

void separable_out(const Tensor& x, const Optional& matrix_h, const Tensor& matrix_w, int64_t height, int64_t width,
                   int64_t prefix, Tensor out) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  const int64_t tokens = check_separable(x, axes);
  check("out", out, {x.size(0), tokens, x.size(2)}, x.scalar_type());
  const Destination y(out, {x});
  write_separable(x, axes, y.result);
  y.deliver();
}

struct SpectrumSizes {
  int64_t height, num_bins;
};

SpectrumSizes check_analysis(const Tensor& x, const Axes& axes) {
  check_tokens(x, axes, true);
  const int64_t rows = axes.matrix_w.size(0);
  MLIP_CHECK(rows % 2 == 0, "matrix_w: expected an even number of rows, got ", rows);
  return {axes.matrix_h ? axes.matrix_h->size(1) : axes.height, rows / 2};
}

void write_analysis(const Tensor& x_, const Axes& axes, const Tensor& real, const Tensor& imaginary) {
  if (real.numel() == 0) return;
  const Tensor x = with_unit_stride(x_);
  const int64_t rows = real.size(1), num_bins = real.size(2), channels = real.size(3);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cpu::GridTransform<T> problem{};
    problem.x = tokens_grid(data<T>(x), x.stride(0), x.stride(1), axes.height, axes.width, axes.prefix);
    problem.y = {mutable_data<T>(real),      mutable_data<T>(imaginary), rows,    num_bins,
                 rows * num_bins * channels, num_bins * channels,        channels};
    run_transform(problem, x, axes.matrix_h, axes.matrix_w, true);
  });
}

std::tuple<Tensor, Tensor> analysis(const Tensor& x, const Optional& matrix_h, const Tensor& matrix_w, int64_t height,
                                    int64_t width, int64_t prefix) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  const SpectrumSizes sizes = check_analysis(x, axes);
  Tensor real = torch::stable::new_empty(x, {x.size(0), sizes.height, sizes.num_bins, x.size(2)});
  Tensor imaginary = torch::stable::new_empty(x, {x.size(0), sizes.height, sizes.num_bins, x.size(2)});
  write_analysis(x, axes, real, imaginary);
  return {real, imaginary};
}

void analysis_out(const Tensor& x, const Optional& matrix_h, const Tensor& matrix_w, int64_t height, int64_t width,
                  int64_t prefix, Tensor out_real, Tensor out_imaginary) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  const SpectrumSizes sizes = check_analysis(x, axes);
  check("out_real", out_real, {x.size(0), sizes.height, sizes.num_bins, x.size(2)}, x.scalar_type());
  check("out_imaginary", out_imaginary, {x.size(0), sizes.height, sizes.num_bins, x.size(2)}, x.scalar_type());
  const Destination real(out_real, {x}), imaginary(out_imaginary, {x, out_real});
  write_analysis(x, axes, real.result, imaginary.result);
  real.deliver();
  imaginary.deliver();
}

int64_t check_synthesis(const Tensor& real, const Tensor& imaginary, const Optional& matrix_h, const Tensor& matrix_w,
                        int64_t prefix) {
  MLIP_CHECK(real.dim() == 4, "real: expected [B, H, K, D]");
  const int64_t height = real.size(1), num_bins = real.size(2);
  MLIP_CHECK(height >= 1 && num_bins >= 1, "real: expected [B, H, K, D] with H, K >= 1, got ", height, " and ",
             num_bins);
  check("imaginary", imaginary, {real.size(0), height, num_bins, real.size(3)}, real.scalar_type());
  const ScalarType wide = accumulate_in(real.scalar_type());
  if (matrix_h) check_axis("matrix_h", *matrix_h, true, height, wide);
  check_axis("matrix_w", matrix_w, false, 2 * num_bins, wide);
  MLIP_CHECK(prefix >= 0, "prefix_tokens: expected at least 0, got ", prefix);
  return prefix + (matrix_h ? matrix_h->size(1) : height) * matrix_w.size(0);
}

void write_synthesis(const Tensor& real_, const Tensor& imaginary_, const Optional& matrix_h, const Tensor& matrix_w,
                     int64_t prefix, const Tensor& y) {
  if (y.numel() == 0) return;
  Tensor real = with_unit_stride(real_), imaginary = with_unit_stride(imaginary_);
  for (int64_t axis = 0; axis < 3; ++axis) {
    if (real.stride(axis) == imaginary.stride(axis)) continue;
    real = torch::stable::contiguous(real), imaginary = torch::stable::contiguous(imaginary);
  }
  const int64_t tokens = y.size(1), channels = y.size(2), width = matrix_w.size(0);
  for_type(real.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cpu::GridTransform<T> problem{};
    problem.prefix = prefix;
    problem.x = {data<T>(real),  data<T>(imaginary), real.size(1),  real.size(2),
                 real.stride(0), real.stride(1),     real.stride(2)};
    problem.y = tokens_grid(mutable_data<T>(y), tokens * channels, channels, (tokens - prefix) / width, width, prefix);
    run_transform(problem, real, matrix_h, matrix_w, true);
  });
}

Tensor synthesis(const Tensor& real, const Tensor& imaginary, const Optional& matrix_h, const Tensor& matrix_w,
                 int64_t prefix) {
  const int64_t tokens = check_synthesis(real, imaginary, matrix_h, matrix_w, prefix);
  Tensor y = torch::stable::new_empty(real, {real.size(0), tokens, real.size(3)});
  write_synthesis(real, imaginary, matrix_h, matrix_w, prefix, y);
  return y;
}

void synthesis_out(const Tensor& real, const Tensor& imaginary, const Optional& matrix_h, const Tensor& matrix_w,
                   int64_t prefix, Tensor out) {
  const int64_t tokens = check_synthesis(real, imaginary, matrix_h, matrix_w, prefix);
  check("out", out, {real.size(0), tokens, real.size(3)}, real.scalar_type());
  const Destination y(out, {real, imaginary});
  write_synthesis(real, imaginary, matrix_h, matrix_w, prefix, y.result);
  y.deliver();
}

// Filter and energies.

// Whether row rows - k is the conjugate of row k up to a rounding: what makes half of the rows of the FFT enough.
template <typename A>
bool is_hermitian(const cpu::Matrix<A>& real, const cpu::Matrix<A>& imaginary) {
  const auto same = [](A a, A b) { return std::abs(a - b) <= 4 * std::numeric_limits<A>::epsilon() * std::abs(a); };
  for (int64_t k = 0; k < real.rows; ++k) {
    const int64_t row = k * real.stride_row, image = k == 0 ? 0 : (real.rows - k) * real.stride_row;
    for (int64_t n = 0; n < real.columns; ++n) {
      const A *re = real.data + n * real.stride_column, *im = imaginary.data + n * real.stride_column;
      if (!same(re[row], re[image]) || !same(im[row], -im[image])) return false;
    }
  }
  return true;
}

template <typename A>
cpu::Spectrum<A> spectrum(const Axes& axes, bool fourier) {
  using Transform = cpu::AxisTransform<A>;
  cpu::Spectrum<A> result{};
  result.fourier = fourier, result.height = axes.height, result.width = axes.width;
  const cpu::Matrix<A> row = matrix<A>(axes.matrix_w);
  if (!fourier) {
    result.rows = Transform(row), result.rows_back = Transform(transposed(row));
    if (!axes.matrix_h) return result;
    const cpu::Matrix<A> column = matrix<A>(*axes.matrix_h);
    result.columns = Transform(column), result.columns_back = Transform(transposed(column));
    return result;
  }
  const int64_t num_bins = axes.width / 2 + 1;
  const cpu::Matrix<A> cosine = rows_of(row, 0, num_bins), sine = rows_of(row, num_bins, num_bins);
  result.rows = Transform::real_fourier(cosine, sine, false);
  result.rows_back = Transform::real_fourier(cosine, sine, true);
  if (!axes.matrix_h) return result;
  const cpu::Matrix<A> real = matrix<A>(*axes.matrix_h, 0), imaginary = matrix<A>(*axes.matrix_h, 1);
  MLIP_CHECK(is_hermitian(real, imaginary), "matrix_h: expected the matrix of the FFT");
  result.columns = Transform::real_fourier(real, imaginary, false);
  result.columns_back = Transform::real_fourier(real, imaginary, true);
  return result;
}

// A problem with what all of them have in common.
template <template <typename> class Problem, typename T>
Problem<T> problem_of(const Tensor& x, const Axes& axes, bool fourier) {
  Problem<T> problem{};
  problem.spectrum = spectrum<cpu::Accumulate<T>>(axes, fourier);
  problem.batch = x.size(0), problem.channels = x.size(2), problem.prefix = axes.prefix;
  problem.x = data<T>(x);
  problem.stride_batch = x.stride(0), problem.stride_token = x.stride(1);
  return problem;
}

void check_filtered(const Tensor& x, const Tensor& weight, const Axes& axes) {
  const bool fourier = weight.dim() == 4;
  check_spectrum(x, axes, fourier);
  const ScalarType wide = accumulate_in(x.scalar_type());
  if (fourier) {
    check("weight", weight, {axes.height, axes.width / 2 + 1, x.size(2), 2}, wide);
  } else {
    check("weight", weight, {axes.height, axes.width, x.size(2)}, wide);
  }
}

void write_filtered(const Tensor& x_, const Tensor& weight_, const Axes& axes, const Tensor& y) {
  const Tensor x = with_unit_stride(x_), weight = torch::stable::contiguous(weight_);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = problem_of<cpu::Filtered, T>(x, axes, weight.dim() == 4);
    problem.weight = data<cpu::Accumulate<T>>(weight);
    problem.y = mutable_data<T>(y);
    run(&cpu::filtered<T>, problem, problem.tasks(), problem.tokens() * cpu::BLOCK_CHANNELS);
  });
}

Tensor filtered(const Tensor& x, const Tensor& weight, const Optional& matrix_h, const Tensor& matrix_w, int64_t height,
                int64_t width, int64_t prefix) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  check_filtered(x, weight, axes);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  write_filtered(x, weight, axes, y);
  return y;
}

void filtered_out(const Tensor& x, const Tensor& weight, const Optional& matrix_h, const Tensor& matrix_w,
                  int64_t height, int64_t width, int64_t prefix, Tensor out) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  check_filtered(x, weight, axes);
  check("out", out, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const Destination y(out, {x, weight});
  write_filtered(x, weight, axes, y.result);
  y.deliver();
}

Tensor filtered_backward_weight(const Tensor& grad_, const Tensor& x_, const Optional& matrix_h, const Tensor& matrix_w,
                                int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  check_spectrum(x_, axes, fourier);
  check("grad", grad_, {x_.size(0), x_.size(1), x_.size(2)}, x_.scalar_type());
  const ScalarType wide = accumulate_in(x_.scalar_type());
  const Tensor grad = with_unit_stride(grad_), x = with_unit_stride(x_);
  Tensor grad_weight = fourier ? torch::stable::new_empty(x, {height, width / 2 + 1, x.size(2), 2}, wide)
                               : torch::stable::new_empty(x, {height, width, x.size(2)}, wide);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    auto problem = problem_of<cpu::FilteredBackwardWeight, T>(x, axes, fourier);
    problem.grad = data<T>(grad);
    problem.grad_stride_batch = grad.stride(0), problem.grad_stride_token = grad.stride(1);
    const bool one_segment = problem.segments() == 1;
    const Tensor partial =
        one_segment ? grad_weight : torch::stable::new_empty(x, {problem.segments(), problem.elements()}, wide);
    problem.partial = mutable_data<A>(partial);
    problem.grad_weight = mutable_data<A>(grad_weight);
    run(&cpu::filtered_backward_weight_sums<T>, problem, problem.tasks(),
        problem.tokens() * problem.SEGMENT * cpu::BLOCK_CHANNELS);
    if (one_segment) return;
    run(&cpu::filtered_backward_weight_finish<T>, problem, problem.elements(), problem.segments() + 1);
  });
  return grad_weight;
}

void check_bands(const Tensor& bands, int64_t count, const Axes& axes, bool fourier) {
  check("bands", bands, {axes.height * (fourier ? axes.width / 2 + 1 : axes.width)}, ScalarType::Int);
  MLIP_CHECK(count >= 1, "count: expected at least 1, got ", count);
}

Tensor band_energy(const Tensor& x_, const Tensor& bands_, int64_t count, const Optional& matrix_h,
                   const Tensor& matrix_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  check_spectrum(x_, axes, fourier);
  check_bands(bands_, count, axes, fourier);
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  Tensor energy = torch::stable::new_empty(x, {x.size(0), count, x.size(2)});
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = problem_of<cpu::BandEnergy, T>(x, axes, fourier);
    problem.bands = data<int32_t>(bands), problem.count = count;
    problem.energy = mutable_data<T>(energy);
    run(&cpu::band_energy<T>, problem, problem.tasks(), problem.tokens() * cpu::BLOCK_CHANNELS);
  });
  return energy;
}

Tensor band_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& bands_, const Optional& matrix_h,
                            const Tensor& matrix_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  check_spectrum(x_, axes, fourier);
  MLIP_CHECK(grad_.dim() == 3, "grad: expected [B, bands, D]");
  const int64_t count = grad_.size(1);
  check("grad", grad_, {x_.size(0), count, x_.size(2)}, x_.scalar_type());
  check_bands(bands_, count, axes, fourier);
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = problem_of<cpu::BandEnergy, T>(x, axes, fourier);
    problem.bands = data<int32_t>(bands), problem.count = count;
    problem.grad = data<T>(grad);
    problem.grad_x = mutable_data<T>(grad_x);
    run(&cpu::band_energy_backward<T>, problem, problem.tasks(), problem.tokens() * cpu::BLOCK_CHANNELS);
  });
  return grad_x;
}

// Returns whether the basis is that of Fourier.
bool check_token_energy(const Tensor& x, const Tensor& frequency_mask, const Axes& axes) {
  const ScalarType wide = accumulate_in(x.scalar_type());
  const bool fourier = frequency_mask.dim() == 3;
  if (fourier) {
    check("frequency_mask", frequency_mask, {axes.height, axes.width / 2 + 1, 1}, wide);
  } else {
    check("frequency_mask", frequency_mask, {axes.height, axes.width}, wide);
  }
  check_spectrum(x, axes, fourier);
  return fourier;
}

Tensor token_energy(const Tensor& x_, const Tensor& kept, const Optional& matrix_h, const Tensor& matrix_w,
                    int64_t height, int64_t width, int64_t prefix) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  const bool fourier = check_token_energy(x_, kept, axes);
  const ScalarType wide = accumulate_in(x_.scalar_type());
  const Tensor x = with_unit_stride(x_), frequency_mask = torch::stable::contiguous(kept);
  Tensor energy = torch::stable::new_empty(x, {x.size(0), x.size(1)}, wide);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    auto problem = problem_of<cpu::TokenEnergy, T>(x, axes, fourier);
    problem.frequency_mask = data<A>(frequency_mask);
    Tensor partial = torch::stable::new_empty(x, {problem.forward_tasks(), height * width}, wide);
    problem.partial = mutable_data<A>(partial);
    problem.energy = mutable_data<A>(energy);
    run(&cpu::token_energy_sums<T>, problem, problem.forward_tasks(),
        problem.tokens() * problem.SEGMENT * cpu::BLOCK_CHANNELS);
    run(&cpu::token_energy_finish<T>, problem, problem.batch, problem.segments() * problem.tokens());
  });
  return energy;
}

Tensor token_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& kept, const Optional& matrix_h,
                             const Tensor& matrix_w, int64_t height, int64_t width, int64_t prefix) {
  const Axes axes{matrix_h, matrix_w, height, width, prefix};
  const bool fourier = check_token_energy(x_, kept, axes);
  check("grad", grad_, {x_.size(0), x_.size(1)}, accumulate_in(x_.scalar_type()));
  const Tensor x = with_unit_stride(x_), frequency_mask = torch::stable::contiguous(kept);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = problem_of<cpu::TokenEnergy, T>(x, axes, fourier);
    problem.frequency_mask = data<cpu::Accumulate<T>>(frequency_mask);
    problem.grad = data<cpu::Accumulate<T>>(grad);
    problem.grad_x = mutable_data<T>(grad_x);
    run(&cpu::token_energy_backward<T>, problem, problem.tasks(), problem.tokens() * cpu::BLOCK_CHANNELS);
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("spectral_separable", TORCH_BOX(&separable));
  m.impl("spectral_separable_out", TORCH_BOX(&separable_out));
  m.impl("spectral_analysis", TORCH_BOX(&analysis));
  m.impl("spectral_analysis_out", TORCH_BOX(&analysis_out));
  m.impl("spectral_synthesis", TORCH_BOX(&synthesis));
  m.impl("spectral_synthesis_out", TORCH_BOX(&synthesis_out));
  m.impl("spectral_filtered", TORCH_BOX(&filtered));
  m.impl("spectral_filtered_out", TORCH_BOX(&filtered_out));
  m.impl("spectral_filtered_backward_weight", TORCH_BOX(&filtered_backward_weight));
  m.impl("spectral_band_energy", TORCH_BOX(&band_energy));
  m.impl("spectral_band_energy_backward", TORCH_BOX(&band_energy_backward));
  m.impl("spectral_token_energy", TORCH_BOX(&token_energy));
  m.impl("spectral_token_energy_backward", TORCH_BOX(&token_energy_backward));
}

}  // namespace
}  // namespace mlip::bindings
