// rcp, sqrt, rsqrt, ex2, lg2, sin, cos, tanh.
//
// The .approx forms are computed by the C library, correctly rounded or nearly so; the hardware's are a few units in
// the last place off. What depends on that error cannot be seen here.
#include "elements.h"

namespace ptx {
namespace {

#define MLIP_FUNCTION(Name, expression) \
  struct Name {                         \
    template <class T>                  \
    static T apply(T x) {               \
      return T(expression);             \
    }                                   \
  }
MLIP_FUNCTION(Reciprocal, T(1) / x);
MLIP_FUNCTION(SquareRoot, std::sqrt(x));
MLIP_FUNCTION(ReciprocalSquareRoot, 1 / std::sqrt(double(x)));
MLIP_FUNCTION(Exponential2, std::exp2(x));
MLIP_FUNCTION(Logarithm2, std::log2(x));
MLIP_FUNCTION(Sine, std::sin(x));
MLIP_FUNCTION(Cosine, std::cos(x));
MLIP_FUNCTION(HyperbolicTangent, std::tanh(x));
#undef MLIP_FUNCTION

template <class Function>
void decode(const Mnemonic& mnemonic, Operands& operands, Instruction& i) {
  operands.destination_and_sources(i, 1);
  i.execute = for_float<Function, 1>(mnemonic, i);
}

}  // namespace

void add_special_functions(InstructionSet& set) {
  const std::vector<Type> wide = {Type::f32, Type::f64}, single = {Type::f32};
  const std::vector<Type> narrow = {Type::f16, Type::bf16, Type::f32, Type::f16x2, Type::bf16x2};
  set.add("rcp", wide, decode<Reciprocal>);
  set.add("sqrt", wide, decode<SquareRoot>);
  set.add("rsqrt", wide, decode<ReciprocalSquareRoot>);
  set.add("ex2", narrow, decode<Exponential2>);
  set.add("lg2", single, decode<Logarithm2>);
  set.add("sin", single, decode<Sine>);
  set.add("cos", single, decode<Cosine>);
  set.add("tanh", narrow, decode<HyperbolicTangent>);
}

}  // namespace ptx
