#include "types.h"

#include <iterator>

namespace ptx {

namespace {
const char* const NAMES[] = {"none", "pred", "b8",  "b16", "b32",  "b64", "u8",  "u16",   "u32",    "u64", "s8",
                             "s16",  "s32",  "s64", "f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32"};
const char* const SPACES[] = {"generic", "global", "constant", "shared", "local", "param"};
}  // namespace

std::optional<Type> type_named(const std::string& name) {
  for (size_t i = 1; i < std::size(NAMES); ++i) {
    if (name == NAMES[i]) return Type(i);
  }
  return std::nullopt;
}

const char* name_of(Type type) { return NAMES[size_t(type)]; }
const char* name_of(Space space) { return SPACES[size_t(space)]; }

}  // namespace ptx
