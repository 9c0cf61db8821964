// Linear maps of the spectral family, CPU key: checks, allocation, threads.
#include <tuple>

#include "bindings/cpu/spectral_lines.h"
#include "bindings/cpu/threads.h"
#include "cpu/spectral/analysis.h"
#include "cpu/spectral/separable.h"
#include "cpu/spectral/synthesis.h"

namespace mlip::bindings {
namespace {

Tensor separable(const Tensor& x_, const std::optional<Tensor>& along_h, const Tensor& along_w, int64_t height,
                 int64_t width, int64_t prefix) {
  check_tokens(x_, along_h, along_w, false, height, width, prefix);
  const Tensor x = with_unit_stride(x_);
  const int64_t new_height = along_h ? along_h->size(0) : height, new_width = along_w.size(0);
  Tensor y = torch::stable::new_empty(x, {x.size(0), prefix + new_height * new_width, x.size(2)});

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
  return y;
}

std::tuple<Tensor, Tensor> analysis(const Tensor& x_, const std::optional<Tensor>& along_h, const Tensor& along_w,
                                    int64_t height, int64_t width, int64_t prefix) {
  check_tokens(x_, along_h, along_w, true, height, width, prefix);
  STD_TORCH_CHECK(along_w.size(0) % 2 == 0, "along_w: expected an even number of rows, got ", along_w.size(0));
  const Tensor x = with_unit_stride(x_);
  const int64_t new_height = along_h ? along_h->size(1) : height, kept = along_w.size(0) / 2;
  Tensor real = torch::stable::new_empty(x, {x.size(0), new_height, kept, x.size(2)});
  Tensor imaginary = torch::stable::new_empty(x, {x.size(0), new_height, kept, x.size(2)});

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
  return {real, imaginary};
}

Tensor synthesis(const Tensor& real_, const Tensor& imaginary_, const std::optional<Tensor>& along_h,
                 const Tensor& along_w, int64_t prefix) {
  STD_TORCH_CHECK(real_.dim() == 4, "real: expected [B, H, K, D]");
  const int64_t batch = real_.size(0), height = real_.size(1), kept = real_.size(2), channels = real_.size(3);
  check("imaginary", imaginary_, {batch, height, kept, channels}, real_.scalar_type());
  const ScalarType wide = accumulate_in(real_.scalar_type());
  if (along_h) check_axis("along_h", *along_h, true, height, wide);
  check_axis("along_w", along_w, false, 2 * kept, wide);
  STD_TORCH_CHECK(prefix >= 0, "prefix_tokens: expected at least 0, got ", prefix);
  Tensor real = with_unit_stride(real_), imaginary = with_unit_stride(imaginary_);
  for (int64_t axis = 0; axis < 3; ++axis) {
    if (real.stride(axis) == imaginary.stride(axis)) continue;
    real = torch::stable::contiguous(real), imaginary = torch::stable::contiguous(imaginary);
  }
  const int64_t new_height = along_h ? along_h->size(1) : height;
  Tensor y = torch::stable::new_empty(real, {batch, prefix + new_height * along_w.size(0), channels});

  for_type(real.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::Synthesis<T> problem{};
    problem.batch = batch, problem.channels = channels, problem.prefix = prefix;
    problem.height = height, problem.kept = kept;
    problem.along_h = complex_line<A>(along_h), problem.along_w = line<A>(along_w);
    problem.real = data<T>(real), problem.imaginary = data<T>(imaginary);
    problem.stride_batch = real.stride(0), problem.stride_row = real.stride(1);
    problem.stride_coefficient = real.stride(2);
    problem.y = mutable_data<T>(y);
    parallel_for(0, problem.tasks(), grain(problem.new_tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::synthesis(problem, begin, end); });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("spectral_separable", TORCH_BOX(&separable));
  m.impl("spectral_analysis", TORCH_BOX(&analysis));
  m.impl("spectral_synthesis", TORCH_BOX(&synthesis));
}

}  // namespace
}  // namespace mlip::bindings
