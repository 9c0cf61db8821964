// Each expression as a loop, compiled for the CPU.
#include <climits>
#include <cmath>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

static int population_count(unsigned x) { return __builtin_popcount(x); }
static int population_count64(unsigned long long x) { return __builtin_popcountll(x); }
static int leading_zero_count(unsigned x) { return __builtin_clz(x); }
static int lowest_set_bit(unsigned x) { return __builtin_ffs(int(x)); }
static unsigned reverse_bits(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
static unsigned funnel_shift_left(unsigned high, unsigned low, unsigned by) {
  return unsigned(((static_cast<unsigned long long>(high) << 32 | low) << by) >> 32);
}
static unsigned long long upper_half_of_product(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
static unsigned bits(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
static float float_from(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
static float rounded_product(float a, float b) { return a * b; }
static bool is_nan(float x) { return std::isnan(x); }
static bool is_infinite(float x) { return std::isinf(x); }
static bool is_finite(float x) { return std::isfinite(x); }
static bool sign_bit(float x) { return std::signbit(x); }

#define EXPRESSION(name, Operand, Result, expression)                                                           \
  extern "C" void host_##name(const Operand* as, const Operand* bs, const Operand* cs, Result* to, int count) { \
    for (int i = 0; i < count; ++i) {                                                                           \
      const Operand a = as[i], b = bs[i], c = cs[i];                                                            \
      (void)b, (void)c;                                                                                         \
      to[i] = static_cast<Result>(expression);                                                                  \
    }                                                                                                           \
  }
#include "expressions.h"
