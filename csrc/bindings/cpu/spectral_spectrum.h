// What filters and energies are called with, as their CPU kernels take it.
#pragma once
#include <vector>

#include "bindings/cpu/spectral_lines.h"
#include "cpu/spectral/spectrum.h"

namespace mlip::bindings {

// Tokens, and the square matrices of an orthonormal transform.
inline void check_spectrum(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w, bool fourier,
                           int64_t height, int64_t width, int64_t prefix) {
  check_tokens(x, along_h, along_w, fourier, height, width, prefix);
  if (along_h) STD_TORCH_CHECK(along_h->size(-2) == height, "along_h: expected ", height, " rows");
  const int64_t rows = fourier ? 2 * (width / 2 + 1) : width;
  STD_TORCH_CHECK(along_w.size(0) == rows, "along_w: expected ", rows, " rows, got ", along_w.size(0));
}

template <typename A>
cpu::Matrix<A> transposed(const cpu::Matrix<A>& m) {
  return {m.data, m.columns, m.rows, m.stride_column, m.stride_row};
}

template <typename A>
cpu::Spectrum<A> spectrum(const std::optional<Tensor>& along_h, const Tensor& along_w, bool fourier, int64_t height,
                          int64_t width) {
  cpu::Spectrum<A> result{};
  result.fourier = fourier, result.height = height, result.width = width;
  result.rows = line<A>(along_w);
  result.rows_back = cpu::Line<A>(transposed(matrix<A>(along_w)));
  if (!along_h) return result;
  if (!fourier) {
    result.columns = line<A>(along_h);
    result.columns_back = cpu::Line<A>(transposed(matrix<A>(*along_h)));
    return result;
  }
  result.columns = complex_line<A>(along_h);
  // The way back is the conjugate transpose.
  const A* imaginary = data<A>(*along_h) + along_h->stride(0);
  std::vector<A> negative;
  for (int64_t m = 0; m < height; ++m) {
    for (int64_t n = 0; n < height; ++n)
      negative.push_back(-imaginary[n * along_h->stride(1) + m * along_h->stride(2)]);
  }
  const cpu::Matrix<A> real{data<A>(*along_h), height, height, along_h->stride(2), along_h->stride(1)};
  result.columns_back = cpu::Line<A>(real, {negative.data(), height, height, height, 1});
  return result;
}

template <typename T>
void set_tokens(cpu::SpectralTokens<T>& problem, const Tensor& x, int64_t prefix) {
  problem.batch = x.size(0), problem.channels = x.size(2), problem.prefix = prefix;
  problem.x = data<T>(x);
  problem.stride_batch = x.stride(0), problem.stride_token = x.stride(1);
}

}  // namespace mlip::bindings
