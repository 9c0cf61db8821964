// What filters and energies are called with, as their CPU kernels take it.
#pragma once
#include <cmath>
#include <limits>

#include "bindings/cpu/spectral_lines.h"
#include "cpu/spectral/spectrum.h"

namespace mlip::bindings {

// Tokens, and the square matrices of an orthonormal transform.
inline void check_spectrum(const Tensor& x, const std::optional<Tensor>& along_h, const Tensor& along_w, bool fourier,
                           int64_t height, int64_t width, int64_t prefix) {
  check_tokens(x, along_h, along_w, fourier, height, width, prefix);
  if (along_h) MLIP_CHECK(along_h->size(-2) == height, "along_h: expected ", height, " rows");
  const int64_t rows = fourier ? 2 * (width / 2 + 1) : width;
  MLIP_CHECK(along_w.size(0) == rows, "along_w: expected ", rows, " rows, got ", along_w.size(0));
}

template <typename A>
cpu::Matrix<A> transposed(const cpu::Matrix<A>& m) {
  return {m.data, m.columns, m.rows, m.stride_column, m.stride_row};
}

// Rows [first, first + rows) of a matrix.
template <typename A>
cpu::Matrix<A> part(cpu::Matrix<A> m, int64_t first, int64_t rows) {
  m.data += first * m.stride_row, m.rows = rows;
  return m;
}

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
cpu::Spectrum<A> spectrum(const std::optional<Tensor>& along_h, const Tensor& along_w, bool fourier, int64_t height,
                          int64_t width) {
  cpu::Spectrum<A> result{};
  result.fourier = fourier, result.height = height, result.width = width, result.along_columns = along_h.has_value();
  const cpu::Matrix<A> row = matrix<A>(along_w);
  if (!fourier) {
    result.rows = cpu::Line<A>(row), result.rows_back = cpu::Line<A>(transposed(row));
    if (!along_h) return result;
    result.columns = line<A>(along_h), result.columns_back = cpu::Line<A>(transposed(matrix<A>(*along_h)));
    return result;
  }
  const int64_t kept = width / 2 + 1;
  result.fourier_rows = cpu::FourierLine<A>(part(row, 0, kept), part(row, kept, kept));
  if (!along_h) return result;
  cpu::Matrix<A> real{data<A>(*along_h), height, height, along_h->stride(1), along_h->stride(2)}, imaginary = real;
  imaginary.data += along_h->stride(0);
  MLIP_CHECK(is_hermitian(real, imaginary), "along_h: expected the matrix of the FFT");
  result.fourier_columns = cpu::FourierLine<A>(real, imaginary);
  return result;
}

template <typename T>
void set_tokens(cpu::SpectralTokens<T>& problem, const Tensor& x, int64_t prefix) {
  problem.batch = x.size(0), problem.channels = x.size(2), problem.prefix = prefix;
  problem.x = data<T>(x);
  problem.stride_batch = x.stride(0), problem.stride_token = x.stride(1);
}

}  // namespace mlip::bindings
