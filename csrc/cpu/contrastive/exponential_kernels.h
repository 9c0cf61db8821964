// exp of every lane, for numbers up to 88 (709 for double). Included by *_kernels.h.
//
// exp(x) = 2^k exp(r) with k the integer nearest to x / ln 2 and |r| <= ln 2 / 2. The Taylor polynomial of exp(r) is
// off by 0.2 * 2^-24 of it (double: 0.1 * 2^-53); with roundings the error is about one unit in the last place. exp(0)
// is 1. What would be subnormal is 0, and so is exp(-inf); NaN stays.

template <typename A>
struct Exponential;
template <>
struct Exponential<float> {
  using Bits = Bits32;
  static constexpr float LOWEST = -87.0f, PER_LN2 = 1.44269504f, ROUNDER = 0x1.8p23f;
  static constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;  // k times the high part is exact
  static constexpr int MANTISSA = 23;
  static constexpr float COEFFICIENTS[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
};
template <>
struct Exponential<double> {
  using Bits = VectorOf<double>::bits;
  static constexpr double LOWEST = -708.0, PER_LN2 = 1.4426950408889634, ROUNDER = 0x1.8p52;
  static constexpr double LN2_HIGH = 0x1.62e42fefap-1, LN2_LOW = 0x1.cf79abc9e3b3ap-40;
  static constexpr int MANTISSA = 52;
  static constexpr double COEFFICIENTS[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
};

template <typename A>
MLIP_FORCED Vector<A> exponential(Vector<A> x) {
  using Of = Exponential<A>;
  using Bits = typename Of::Bits;
  const Vector<A> shifted = x * Of::PER_LN2 + Of::ROUNDER;  // its last bits are k
  const Vector<A> k = shifted - Of::ROUNDER;
  const Vector<A> r = (x - k * Of::LN2_HIGH) - k * Of::LN2_LOW;
  Vector<A> sum = broadcast(Of::COEFFICIENTS[0]);
  MLIP_FULLY_UNROLLED for (int i = 1; i < int(sizeof Of::COEFFICIENTS / sizeof(A)); ++i) {
    sum = sum * r + Of::COEFFICIENTS[i];
  }
  const Vector<A> scaled = (Vector<A>)((Bits)sum + ((Bits)shifted << Of::MANTISSA));
  return x >= Of::LOWEST ? scaled : larger(Vector<A>{}, x);  // x where it is NaN
}
