#include "instruction_set.h"

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

std::optional<std::array<int, 3>> Mnemonic::shape() const {
  for (const std::string& modifier : modifiers) {
    std::array<int, 3> found{};
    int used = 0;
    if (std::sscanf(modifier.c_str(), "m%dn%dk%d%n", &found[0], &found[1], &found[2], &used) == 3 &&
        used == int(modifier.size())) {
      return found;
    }
  }
  return std::nullopt;
}

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
