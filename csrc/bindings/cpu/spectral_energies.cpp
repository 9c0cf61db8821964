// Energies by frequency, CPU key: checks, allocation, threads.
#include "bindings/cpu/spectral_spectrum.h"
#include "bindings/cpu/threads.h"
#include "cpu/spectral/band_energy.h"
#include "cpu/spectral/token_energy.h"

namespace mlip::bindings {
namespace {

using Optional = std::optional<Tensor>;

void check_bands(const Tensor& bands, int64_t count, int64_t height, int64_t width, bool fourier) {
  check("bands", bands, {height * (fourier ? width / 2 + 1 : width)}, ScalarType::Int);
  MLIP_CHECK(count >= 1, "count: expected at least 1, got ", count);
}

template <typename T>
cpu::BandEnergy<T> band_energy_problem(const Tensor& x, const Tensor& bands, int64_t count, const Optional& along_h,
                                       const Tensor& along_w, int64_t height, int64_t width, int64_t prefix,
                                       bool fourier) {
  cpu::BandEnergy<T> problem{};
  set_tokens(problem, x, prefix);
  problem.spectrum = spectrum<cpu::Accumulate<T>>(along_h, along_w, fourier, height, width);
  problem.bands = data<int32_t>(bands);
  problem.count = count;
  return problem;
}

Tensor band_energy(const Tensor& x_, const Tensor& bands_, int64_t count, const Optional& along_h,
                   const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  check_spectrum(x_, along_h, along_w, fourier, height, width, prefix);
  check_bands(bands_, count, height, width, fourier);
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  Tensor energy = torch::stable::new_empty(x, {x.size(0), count, x.size(2)});

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = band_energy_problem<T>(x, bands, count, along_h, along_w, height, width, prefix, fourier);
    problem.energy = mutable_data<T>(energy);
    parallel_for(0, problem.tasks(), grain(problem.tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::band_energy(problem, begin, end); });
  });
  return energy;
}

Tensor band_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& bands_, const Optional& along_h,
                            const Tensor& along_w, int64_t height, int64_t width, int64_t prefix, bool fourier) {
  check_spectrum(x_, along_h, along_w, fourier, height, width, prefix);
  MLIP_CHECK(grad_.dim() == 3, "grad: expected [B, bands, D]");
  const int64_t batch = x_.size(0), count = grad_.size(1), channels = x_.size(2);
  check("grad", grad_, {batch, count, channels}, x_.scalar_type());
  check_bands(bands_, count, height, width, fourier);
  const Tensor x = with_unit_stride(x_), bands = torch::stable::contiguous(bands_);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor grad_x = torch::stable::new_empty(x, {batch, x.size(1), channels});

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = band_energy_problem<T>(x, bands, count, along_h, along_w, height, width, prefix, fourier);
    problem.grad = data<T>(grad);
    problem.grad_x = mutable_data<T>(grad_x);
    parallel_for(0, problem.tasks(), grain(problem.tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::band_energy_backward(problem, begin, end); });
  });
  return grad_x;
}

// Returns whether the basis is that of Fourier.
bool check_kept(const Tensor& kept, ScalarType wide, int64_t height, int64_t width) {
  const bool fourier = kept.dim() == 3;
  if (fourier) {
    check("kept", kept, {height, width / 2 + 1, 1}, wide);
  } else {
    check("kept", kept, {height, width}, wide);
  }
  return fourier;
}

template <typename T>
cpu::TokenEnergy<T> token_energy_problem(const Tensor& x, const Tensor& kept, const Optional& along_h,
                                         const Tensor& along_w, int64_t height, int64_t width, int64_t prefix) {
  cpu::TokenEnergy<T> problem{};
  set_tokens(problem, x, prefix);
  problem.spectrum = spectrum<cpu::Accumulate<T>>(along_h, along_w, kept.dim() == 3, height, width);
  problem.kept = data<cpu::Accumulate<T>>(kept);
  return problem;
}

Tensor token_energy(const Tensor& x_, const Tensor& kept_, const Optional& along_h, const Tensor& along_w,
                    int64_t height, int64_t width, int64_t prefix) {
  const ScalarType wide = accumulate_in(x_.scalar_type());
  check_spectrum(x_, along_h, along_w, check_kept(kept_, wide, height, width), height, width, prefix);
  const Tensor x = with_unit_stride(x_), kept = torch::stable::contiguous(kept_);
  Tensor energy = torch::stable::new_empty(x, {x.size(0), x.size(1)}, wide);

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = cpu::Accumulate<T>;
    auto problem = token_energy_problem<T>(x, kept, along_h, along_w, height, width, prefix);
    Tensor partial = torch::stable::new_empty(x, {problem.forward_tasks(), height * width}, wide);
    problem.partial = mutable_data<A>(partial);
    problem.energy = mutable_data<A>(energy);
    parallel_for(0, problem.forward_tasks(), grain(problem.tokens() * problem.SEGMENT * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::token_energy_sums(problem, begin, end); });
    parallel_for(0, problem.batch, grain(problem.segments() * problem.tokens()),
                 [&](int64_t begin, int64_t end) { cpu::token_energy_finish(problem, begin, end); });
  });
  return energy;
}

Tensor token_energy_backward(const Tensor& grad_, const Tensor& x_, const Tensor& kept_, const Optional& along_h,
                             const Tensor& along_w, int64_t height, int64_t width, int64_t prefix) {
  const ScalarType wide = accumulate_in(x_.scalar_type());
  check_spectrum(x_, along_h, along_w, check_kept(kept_, wide, height, width), height, width, prefix);
  check("grad", grad_, {x_.size(0), x_.size(1)}, wide);
  const Tensor x = with_unit_stride(x_), kept = torch::stable::contiguous(kept_);
  const Tensor grad = torch::stable::contiguous(grad_);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});

  for_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto problem = token_energy_problem<T>(x, kept, along_h, along_w, height, width, prefix);
    problem.grad = data<cpu::Accumulate<T>>(grad);
    problem.grad_x = mutable_data<T>(grad_x);
    parallel_for(0, problem.backward_tasks(), grain(problem.tokens() * cpu::BLOCK_CHANNELS),
                 [&](int64_t begin, int64_t end) { cpu::token_energy_backward(problem, begin, end); });
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(mlip_kernels, CPU, m) {
  m.impl("spectral_band_energy", TORCH_BOX(&band_energy));
  m.impl("spectral_band_energy_backward", TORCH_BOX(&band_energy_backward));
  m.impl("spectral_token_energy", TORCH_BOX(&token_energy));
  m.impl("spectral_token_energy_backward", TORCH_BOX(&token_energy_backward));
}

}  // namespace
}  // namespace mlip::bindings
