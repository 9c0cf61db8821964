#include "instruction_set.h"

#include <set>

#include "parser.h"

namespace ptx {

Mnemonic::Mnemonic(const std::string& whole) : text(whole) {
  for (size_t begin = 0; begin <= whole.size();) {
    const size_t end = std::min(whole.find('.', begin), whole.size());
    modifiers.push_back(whole.substr(begin, end - begin));
    begin = end + 1;
  }
  base = modifiers.front();
  modifiers.erase(modifiers.begin());
  for (const std::string& modifier : modifiers) {
    if (const auto type = type_named(modifier)) types.push_back(*type);
  }
}

bool Mnemonic::has(const std::string& modifier) const {
  for (const std::string& candidate : modifiers) {
    if (candidate == modifier) return true;
  }
  return false;
}

std::optional<int> Mnemonic::one_of(const std::vector<std::string>& names) const {
  for (size_t i = 0; i < names.size(); ++i) {
    if (has(names[i])) return int(i);
  }
  return std::nullopt;
}

namespace {

std::optional<std::array<int, 3>> shape_named(const std::string& modifier) {
  std::array<int, 3> found{};
  int used = 0;
  const int read = std::sscanf(modifier.c_str(), "m%dn%dk%d%n", &found[0], &found[1], &found[2], &used);
  if (read != 3 || used != int(modifier.size())) return std::nullopt;
  return found;
}

}  // namespace

std::optional<std::array<int, 3>> Mnemonic::shape() const {
  for (const std::string& modifier : modifiers) {
    if (const auto shape = shape_named(modifier)) return shape;
  }
  return std::nullopt;
}

namespace {

// Decoders look for the modifiers that they know; one that nobody knows would go unnoticed.
bool is_known_modifier(const std::string& modifier) {
  static const std::set<std::string> known = {
      // rounding, ranges, special values
      "rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "noftz", "sat", "relu", "NaN", "approx", "full",
      // parts, directions, widths
      "lo", "hi", "wide", "l", "r", "wrap", "clamp", "shiftamt", "v2", "v4", "v8", "x1", "x2", "x4", "m8n8", "trans",
      "row", "col",
      // comparisons and properties
      "eq", "ne", "lt", "le", "gt", "ge", "ls", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan", "finite",
      "infinite", "number", "notanumber", "normal", "subnormal",
      // operations
      "add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec", "popc", "red", "up", "down", "bfly", "idx",
      "all", "any", "uni", "ballot",
      // state spaces, caches, order
      "global", "const", "local", "shared", "shared::cta", "param", "param::entry", "to", "ca", "cg", "cs", "lu", "cv",
      "wb", "wt", "nc", "L1", "L2", "fractional", "range", "weak", "volatile", "relaxed", "acquire", "release",
      "acq_rel", "sc", "cta", "cluster", "gpu", "sys", "gl", "proxy", "alias",
      // waiting
      "sync", "aligned", "warp", "arrive", "wait", "async", "commit_group", "wait_group", "wait_all", "mma_async",
      "fence", "launch_dependents"};
  const bool cache_hint = modifier.rfind("L1::", 0) == 0 || modifier.rfind("L2::", 0) == 0;
  return cache_hint || known.count(modifier) || type_named(modifier);
}

}  // namespace

InstructionSet::InstructionSet() {
  add_arithmetic(*this);
  add_bits(*this);
  add_compare(*this);
  add_conversion(*this);
  add_move(*this);
  add_special_functions(*this);
  add_memory(*this);
  add_atomics(*this);
  add_exchange(*this);
  add_control(*this);
  add_async_copy(*this);
  add_matrix(*this);
  add_warpgroup_matrix(*this);
}

void InstructionSet::add(const std::string& base, const std::vector<Type>& types, Decode decode) {
  for (const Type type : types) decoders_[{base, type}] = decode;
}

Decode InstructionSet::find(const Mnemonic& mnemonic) const {
  for (const std::string& modifier : mnemonic.modifiers) {
    if (is_known_modifier(modifier) || shape_named(modifier)) continue;
    throw UnsupportedError("unsupported modifier ." + modifier + " of " + mnemonic.text);
  }
  const Type type = mnemonic.types.empty() ? Type::none : mnemonic.types.front();
  const auto exact = decoders_.find({mnemonic.base, type});
  if (exact != decoders_.end()) return exact->second;
  throw UnsupportedError("unsupported instruction " + mnemonic.text);
}

std::vector<std::string> InstructionSet::names() const {
  std::vector<std::string> names;
  for (const auto& [key, decode] : decoders_) {
    const auto& [base, type] = key;
    names.push_back(type == Type::none ? base : base + "." + name_of(type));
  }
  return names;
}

const InstructionSet& instruction_set() {
  static const InstructionSet set;
  return set;
}

}  // namespace ptx
