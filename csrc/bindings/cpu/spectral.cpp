// Linear maps of the spectral family, CPU key: checks, allocation, threads.
#include <tuple>

#include "bindings/cpu/destination.h"
#include "bindings/cpu/spectral_lines.h"
#include "bindings/cpu/threads.h"
#include "cpu/spectral/analysis.h"
#include "cpu/spectral/separable.h"
#include "cpu/spectral/synthesis.h"

namespace mlip::bindings {
namespace {

int64_t separable_tokens(const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height, int64_t prefix) {
  return prefix + (along_h ? along_h->size(0) : height) * along_w.size(0);
}

void write_separable(const Tensor& x_, const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height,
                     int64_t width, int64_t prefix, const Tensor& y) {
  const Tensor x = with_unit_stride(x_);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::Separable<T> problem{};
    problem.batch = x.size(0), problem.channels = x.size(2), problem.prefix = prefix;
    problem.height = height, problem.width = width;
    problem.along_h = line<A>(along_h), problem.along_w = line<A>(along_w);
    problem.x = data<T>(x);
    problem.stride_batch = x.stride(0), problem.stride_token = x.stride(1);
    problem.y = mutable_data<T>(y);
    parallel_for(0, problem.tasks(), grain(problem.tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::separable(problem, begin, end); });
  });
}

Tensor separable(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height,
                 int64_t width, int64_t prefix) {
  check_tokens(x, along_h, along_w, false, height, width, prefix);
  Tensor y = torch::stable::new_empty(x, {x.size(0), separable_tokens(along_h, along_w, height, prefix), x.size(2)});
  write_separable(x, along_h, along_w, height, width, prefix, y);
  return y;
}

void separable_out(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height,
                   int64_t width, int64_t prefix, Tensor out) {
  check_tokens(x, along_h, along_w, false, height, width, prefix);
  check("out", out, {x.size(0), separable_tokens(along_h, along_w, height, prefix), x.size(2)}, x.scalar_type());
  const Destination y(out, {x});
  write_separable(x, along_h, along_w, height, width, prefix, y.result);
  y.deliver();
}

struct SpectrumSizes {
  int64_t height, kept;
};

SpectrumSizes check_analysis(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w,
                             int64_t height, int64_t width, int64_t prefix) {
  check_tokens(x, along_h, along_w, true, height, width, prefix);
  MLIP_CHECK(along_w.size(0) % 2 == 0, "along_w: expected an even number of rows, got ", along_w.size(0));
  return {along_h ? along_h->size(1) : height, along_w.size(0) / 2};
}

void write_analysis(const Tensor& x_, const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height,
                    int64_t width, int64_t prefix, const Tensor& real, const Tensor& imaginary) {
  const Tensor x = with_unit_stride(x_);
  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::Analysis<T> problem{};
    problem.batch = x.size(0), problem.channels = x.size(2), problem.prefix = prefix;
    problem.height = height, problem.width = width;
    problem.along_h = complex_line<A>(along_h), problem.along_w = line<A>(along_w);
    problem.x = data<T>(x);
    problem.stride_batch = x.stride(0), problem.stride_token = x.stride(1);
    problem.real = mutable_data<T>(real), problem.imaginary = mutable_data<T>(imaginary);
    parallel_for(0, problem.tasks(), grain(problem.points() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::analysis(problem, begin, end); });
  });
}

std::tuple<Tensor, Tensor> analysis(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w,
                                    int64_t height, int64_t width, int64_t prefix) {
  const SpectrumSizes sizes = check_analysis(x, along_h, along_w, height, width, prefix);
  Tensor real = torch::stable::new_empty(x, {x.size(0), sizes.height, sizes.kept, x.size(2)});
  Tensor imaginary = torch::stable::new_empty(x, {x.size(0), sizes.height, sizes.kept, x.size(2)});
  write_analysis(x, along_h, along_w, height, width, prefix, real, imaginary);
  return {real, imaginary};
}

void analysis_out(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height,
                  int64_t width, int64_t prefix, Tensor out_real, Tensor out_imaginary) {
  const SpectrumSizes sizes = check_analysis(x, along_h, along_w, height, width, prefix);
  check("out_real", out_real, {x.size(0), sizes.height, sizes.kept, x.size(2)}, x.scalar_type());
  check("out_imaginary", out_imaginary, {x.size(0), sizes.height, sizes.kept, x.size(2)}, x.scalar_type());
  const Destination real(out_real, {x}), imaginary(out_imaginary, {x, out_real});
  write_analysis(x, along_h, along_w, height, width, prefix, real.result, imaginary.result);
  real.deliver();
  imaginary.deliver();
}

int64_t check_synthesis(const Tensor& real, const Tensor& imaginary, const std::optional<Tensor>& along_h,
                        const Tensor& along_w, int64_t prefix) {
  MLIP_CHECK(real.dim() == 4, "real: expected [B, H, K, D]");
  const int64_t height = real.size(1), kept = real.size(2);
  MLIP_CHECK(height >= 1 && kept >= 1, "real: expected [B, H, K, D] with H, K >= 1, got ", height, " and ", kept);
  check("imaginary", imaginary, {real.size(0), height, kept, real.size(3)}, real.scalar_type());
  const ScalarType wide = accumulate_in(real.scalar_type());
  if (along_h) check_axis("along_h", *along_h, true, height, wide);
  check_axis("along_w", along_w, false, 2 * kept, wide);
  MLIP_CHECK(prefix >= 0, "prefix_tokens: expected at least 0, got ", prefix);
  return prefix + (along_h ? along_h->size(1) : height) * along_w.size(0);
}

void write_synthesis(const Tensor& real_, const Tensor& imaginary_, const std::optional<Tensor>& along_h,
                     const Tensor& along_w, int64_t prefix, const Tensor& y) {
  Tensor real = with_unit_stride(real_), imaginary = with_unit_stride(imaginary_);
  for (int64_t axis = 0; axis < 3; ++axis) {
    if (real.stride(axis) == imaginary.stride(axis)) continue;
    real = torch::stable::contiguous(real), imaginary = torch::stable::contiguous(imaginary);
  }

  for_type(real.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::Synthesis<T> problem{};
    problem.batch = real.size(0), problem.channels = real.size(3), problem.prefix = prefix;
    problem.height = real.size(1), problem.kept = real.size(2);
    problem.along_h = complex_line<A>(along_h), problem.along_w = line<A>(along_w);
    problem.real = data<T>(real), problem.imaginary = data<T>(imaginary);
    problem.stride_batch = real.stride(0), problem.stride_row = real.stride(1);
    problem.stride_coefficient = real.stride(2);
    problem.y = mutable_data<T>(y);
    parallel_for(0, problem.tasks(), grain(problem.new_tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::synthesis(problem, begin, end); });
  });
}

Tensor synthesis(const Tensor& real, const Tensor& imaginary, const std::optional<Tensor>& along_h,
                 const Tensor& along_w, int64_t prefix) {
  const int64_t tokens = check_synthesis(real, imaginary, along_h, along_w, prefix);
  Tensor y = torch::stable::new_empty(real, {real.size(0), tokens, real.size(3)});
  write_synthesis(real, imaginary, along_h, along_w, prefix, y);
  return y;
}

void synthesis_out(const Tensor& real, const Tensor& imaginary, const std::optional<Tensor>& along_h,
                   const Tensor& along_w, int64_t prefix, Tensor out) {
  const int64_t tokens = check_synthesis(real, imaginary, along_h, along_w, prefix);
  check("out", out, {real.size(0), tokens, real.size(3)}, real.scalar_type());
  const Destination y(out, {real, imaginary});
  write_synthesis(real, imaginary, along_h, along_w, prefix, y.result);
  y.deliver();
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("spectral_separable", TORCH_BOX(&separable));
  m.impl("spectral_separable_out", TORCH_BOX(&separable_out));
  m.impl("spectral_analysis", TORCH_BOX(&analysis));
  m.impl("spectral_analysis_out", TORCH_BOX(&analysis_out));
  m.impl("spectral_synthesis", TORCH_BOX(&synthesis));
  m.impl("spectral_synthesis_out", TORCH_BOX(&synthesis_out));
}

}  // namespace
}  // namespace mlip::bindings
