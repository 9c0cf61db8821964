// Linear maps of the spectral family, CPU key: checks, allocation, threads.
#include "bindings/cpu/spectral_lines.h"
#include "bindings/cpu/threads.h"
#include "cpu/spectral/separable.h"

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
    parallel_for(0, problem.tasks(), grain(problem.tokens() * problem.BLOCK),
                 [&](int64_t begin, int64_t end) { cpu::separable(problem, begin, end); });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) { m.impl("spectral_separable", TORCH_BOX(&separable)); }

}  // namespace
}  // namespace mlip::bindings
