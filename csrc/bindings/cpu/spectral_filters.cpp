// Spectral filter, CPU key: checks, allocation, threads.
#include "bindings/cpu/destination.h"
#include "bindings/cpu/spectral_spectrum.h"
#include "bindings/cpu/threads.h"
#include "cpu/spectral/filtered.h"
#include "cpu/spectral/filtered_backward_weight.h"

namespace mlip::bindings {
namespace {

void check_filtered(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& along_h, const Tensor& along_w,
                    int64_t height, int64_t width, int64_t prefix) {
  const bool fourier = weight.dim() == 4;
  check_spectrum(x, along_h, along_w, fourier, height, width, prefix);
  const ScalarType wide = accumulate_in(x.scalar_type());
  if (fourier) {
    check("weight", weight, {height, width / 2 + 1, x.size(2), 2}, wide);
  } else {
    check("weight", weight, {height, width, x.size(2)}, wide);
  }
}

void write_filtered(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& along_h,
                    const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, const Tensor& y) {
  const bool fourier = weight_.dim() == 4;
  const Tensor x = with_unit_stride(x_), weight = torch::stable::contiguous(weight_);

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cpu::Filtered<T> problem{};
    set_tokens(problem, x, prefix);
    problem.spectrum = spectrum<cpu::Accumulate<T>>(along_h, along_w, fourier, height, width);
    problem.weight = data<cpu::Accumulate<T>>(weight);
    problem.y = mutable_data<T>(y);
    parallel_for(0, problem.tasks(), grain(problem.tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::filtered(problem, begin, end); });
  });
}

Tensor filtered(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& along_h, const Tensor& along_w,
                int64_t height, int64_t width, int64_t prefix) {
  check_filtered(x, weight, along_h, along_w, height, width, prefix);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  write_filtered(x, weight, along_h, along_w, height, width, prefix, y);
  return y;
}

void filtered_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& along_h, const Tensor& along_w,
                  int64_t height, int64_t width, int64_t prefix, Tensor out) {
  check_filtered(x, weight, along_h, along_w, height, width, prefix);
  check("out", out, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const Destination y(out, {x, weight});
  write_filtered(x, weight, along_h, along_w, height, width, prefix, y.result);
  y.deliver();
}

Tensor filtered_backward_weight(const Tensor& grad_, const Tensor& x_, const std::optional<Tensor>& along_h,
                                const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  check_spectrum(x_, along_h, along_w, fourier, height, width, prefix);
  check("grad", grad_, {x_.size(0), x_.size(1), x_.size(2)}, x_.scalar_type());
  const ScalarType wide = accumulate_in(x_.scalar_type());
  const Tensor grad = with_unit_stride(grad_), x = with_unit_stride(x_);
  Tensor grad_weight = fourier ? torch::stable::new_empty(x, {height, width / 2 + 1, x.size(2), 2}, wide)
                               : torch::stable::new_empty(x, {height, width, x.size(2)}, wide);

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    cpu::FilteredBackwardWeight<T> problem{};
    set_tokens(problem, x, prefix);
    problem.spectrum = spectrum<A>(along_h, along_w, fourier, height, width);
    problem.grad = data<T>(grad);
    problem.grad_stride_batch = grad.stride(0), problem.grad_stride_token = grad.stride(1);
    const bool one_segment = problem.segments() == 1;
    const Tensor partial =
        one_segment ? grad_weight : torch::stable::new_empty(x, {problem.segments(), problem.elements()}, wide);
    problem.partial = mutable_data<A>(partial);
    problem.grad_weight = mutable_data<A>(grad_weight);
    parallel_for(0, problem.tasks(), grain(problem.tokens() * problem.SEGMENT * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::filtered_backward_weight_sums(problem, begin, end); });
    if (one_segment) return;
    parallel_for(0, problem.elements(), grain(problem.segments() + 1),
                 [&](int64_t begin, int64_t end) { cpu::filtered_backward_weight_finish(problem, begin, end); });
  });
  return grad_weight;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("spectral_filtered", TORCH_BOX(&filtered));
  m.impl("spectral_filtered_out", TORCH_BOX(&filtered_out));
  m.impl("spectral_filtered_backward_weight", TORCH_BOX(&filtered_backward_weight));
}

}  // namespace
}  // namespace mlip::bindings
