#include "parser.h"

#include <cstdlib>
#include <set>

#include "instruction_set.h"
#include "lexer.h"

namespace ptx {
namespace {

const std::map<std::string, Special> SPECIAL = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%dynamic_smem_size", Special::dynamic_shared_size},
    {"%total_smem_size", Special::total_shared_size},

    // Every block is a cluster of its own.
    {"%cluster_ctarank", Special::zero},
    {"%cluster_ctaid.x", Special::zero},
    {"%cluster_ctaid.y", Special::zero},
    {"%cluster_ctaid.z", Special::zero},
    {"%cluster_nctarank", Special::one},
    {"%cluster_nctaid.x", Special::one},
    {"%cluster_nctaid.y", Special::one},
    {"%cluster_nctaid.z", Special::one},
};

int align_up(int value, int alignment) { return (value + alignment - 1) / alignment * alignment; }

// .type .space .align N name[d0][d1] = {...}
struct Declaration {
  std::string name;
  Type type = Type::b8;
  int alignment = 1;
  int64_t elements = 1;
  bool external = false;
  std::vector<uint64_t> initial;
  std::string initial_symbol;  // an initialiser that is an address

  int64_t bytes() const { return elements * size_of(type); }
};

// A name that stands for an address in shared, local or parameter memory.
struct Symbol {
  Space space;
  int64_t address;
};

class Parser : public Operands {
 public:
  explicit Parser(const std::string& text) : tokens_(tokenize(text)) {
    tokens_.push_back({"", tokens_.empty() ? 1 : tokens_.back().line});
  }

  Program run() {
    while (!at_end()) top_level();
    return std::move(program_);
  }

  // --- operands ---

  Row row() override {
    if (next_is("-") || is_number(text())) return constant(number(constants_are_));
    const std::string name = take();
    if (name == "_") return new_row();
    if (name == "WARP_SZ") return constant(WARP_SIZE);
    if (const auto special = SPECIAL.find(name); special != SPECIAL.end()) return special_row(special->second);
    if (const Row found = find_register(name); found != NO_ROW) return found;
    if (const auto symbol = symbols_.find(name); symbol != symbols_.end()) {
      const int64_t window = symbol->second.space == Space::local ? int64_t(LOCAL_WINDOW) : 0;
      return constant(uint64_t(symbol->second.address + window + (accept("+") ? int64_t(integer()) : 0)));
    }
    if (const auto variable = program_.variables.find(name); variable != program_.variables.end()) {
      return constant(variable->second.address + (accept("+") ? integer() : 0));
    }
    if (name[0] == '%') throw UnsupportedError("unsupported special register " + name);
    fail("unknown operand '" + name + "'");
  }

  std::vector<Row> rows() override {
    if (!accept("{")) return {row()};
    std::vector<Row> found;
    do {
      found.push_back(row());
    } while (accept(","));
    expect("}");
    return found;
  }

  Address address(Space* space) override {
    expect("[");
    Address found;
    if (is_number(text())) {
      found.base = constant(integer());
    } else {
      const std::string name = take();
      if (const Row base = find_register(name); base != NO_ROW) {
        found.base = base;
      } else if (const auto symbol = symbols_.find(name); symbol != symbols_.end()) {
        found.base = constant(uint64_t(symbol->second.address));
        if (space && symbol->second.space == Space::param) *space = Space::param;
      } else if (const auto variable = program_.variables.find(name); variable != program_.variables.end()) {
        found.base = constant(variable->second.address);
      } else {
        fail("unknown address '" + name + "'");
      }
    }
    while (next_is("+") || next_is("-")) {
      bool negative = take() == "-";
      if (accept("-")) negative = !negative;
      const int64_t step = int64_t(integer());
      found.offset += negative ? -step : step;
    }
    expect("]");
    return found;
  }

  int immediate() override {
    const bool negative = accept("-");
    const int value = int(integer());
    return negative ? -value : value;
  }

  bool accept(const char* token) override {
    if (!next_is(token)) return false;
    ++at_;
    return true;
  }

  void expect(const char* token) override {
    if (!accept(token)) fail("expected '" + std::string(token) + "', got '" + text() + "'");
  }

  bool next_is(const char* token) override { return text() == token; }
  std::string label() override { return take(); }
  void immediates_are(Type type) override { constants_are_ = type; }

  bool is_predicate(Row row) const override { return predicates_.count(row) != 0; }
  bool has_64_bits(Row row) const override { return of_64_bits_.count(row) != 0; }

  void skip_rest() override {
    while (!next_is(";") && !at_end()) ++at_;
  }

 private:
  // --- tokens ---

  bool at_end() const { return at_ + 1 >= tokens_.size(); }
  const std::string& text() const { return tokens_[at_].text; }
  int line() const { return tokens_[at_].line; }

  std::string take() {
    if (at_end()) fail("the text ends too early");
    return tokens_[at_++].text;
  }

  [[noreturn]] void fail(const std::string& message) const { fail(message, line()); }
  [[noreturn]] static void fail(const std::string& message, int line) {
    throw ParseError("PTX line " + std::to_string(line) + ": " + message);
  }

  static bool is_number(const std::string& word) { return !word.empty() && word[0] >= '0' && word[0] <= '9'; }

  uint64_t integer() {
    if (!is_number(text())) fail("expected a number, got '" + text() + "'");
    return std::strtoull(take().c_str(), nullptr, 0);
  }

  // A constant as the bits of a register of `type`.
  uint64_t number(Type type) {
    const bool negative = accept("-");
    if (!is_number(text())) fail("expected a number, got '" + text() + "'");
    const std::string word = take();
    const bool bits_of_float = word.size() == 10 && word[0] == '0' && (word[1] == 'f' || word[1] == 'F');
    const bool bits_of_double = word.size() == 18 && word[0] == '0' && (word[1] == 'd' || word[1] == 'D');
    if (bits_of_float || bits_of_double) {
      const uint64_t bits = std::strtoull(word.c_str() + 2, nullptr, 16);
      return negative ? bits ^ (uint64_t(1) << (bits_of_float ? 31 : 63)) : bits;
    }
    const bool hexadecimal = word.rfind("0x", 0) == 0 || word.rfind("0X", 0) == 0;
    if (!hexadecimal && word.find_first_of(".eE") != std::string::npos) {
      const double value = std::strtod(word.c_str(), nullptr) * (negative ? -1 : 1);
      return type == Type::f64 ? bit_cast<uint64_t>(value) : bit_cast<uint32_t>(float(value));
    }
    const uint64_t value = std::strtoull(word.c_str(), nullptr, 0);
    return negative ? uint64_t(0) - value : value;
  }

  void skip_to_semicolon() {
    skip_rest();
    if (!at_end()) ++at_;
  }

  void skip_braces() {
    int depth = 0;
    do {
      depth += next_is("{") ? 1 : next_is("}") ? -1 : 0;
      ++at_;
    } while (depth && !at_end());
  }

  // --- module scope ---

  void top_level() {
    const std::string word = take();
    if (word == ".visible" || word == ".weak" || word == ".common") return;
    if (word == ".extern") return external();
    if (word == ".shared") {
      const Declaration declared = declaration(false);
      shared_of_module_[declared.name] = declared;
    } else if (word == ".global" || word == ".const") {
      variable(declaration(false), word == ".global");
    } else if (word == ".entry") {
      entry();
    } else if (word == ".func") {
      while (!next_is(";") && !next_is("{") && !at_end()) ++at_;
      next_is("{") ? skip_braces() : skip_to_semicolon();
    } else if (word == ".section") {
      while (!next_is("{") && !at_end()) ++at_;
      skip_braces();
    } else if (word == ".pragma" || word == ".alias") {
      skip_to_semicolon();
    } else if (word.rfind(".file", 0) == 0) {
      file(word);
    } else if (word.rfind(".version", 0) && word.rfind(".target", 0) && word.rfind(".address_size", 0) &&
               word.rfind(".loc", 0)) {
      --at_;
      fail("unexpected '" + word + "' at module scope");
    }
  }

  void external() {
    if (accept(".shared")) {
      const Declaration declared = declaration(true);
      shared_of_module_[declared.name] = declared;
    } else {
      skip_to_semicolon();
    }
  }

  // .file 1 "/path/name.cu" or .file 1 "folder" "name.py"
  void file(const std::string& line_of_text) {
    const int index = std::atoi(line_of_text.c_str() + 5);
    const size_t end = line_of_text.rfind('"');
    const size_t begin = end == std::string::npos || end == 0 ? end : line_of_text.rfind('"', end - 1);
    if (begin == std::string::npos) return;
    const std::string path = line_of_text.substr(begin + 1, end - begin - 1);
    program_.files[index] = path.substr(path.rfind('/') + 1);
  }

  Declaration declaration(bool external) {
    Declaration found;
    found.external = external;
    bool aligned = false;
    while (!accept(";")) {
      if (accept(".align")) {
        found.alignment = int(integer());
        aligned = true;
      } else if (accept(".attribute")) {
        while (!accept(")")) ++at_;
      } else if (accept("[")) {
        found.elements *= next_is("]") ? 0 : int64_t(integer());
        expect("]");
      } else if (accept("=")) {
        initialiser(found);
      } else if (text() == ".v2" || text() == ".v4") {
        found.elements *= take()[2] - '0';
      } else if (text()[0] == '.') {
        if (const auto type = type_named(text().substr(1))) found.type = *type;
        ++at_;
      } else if (!accept(",")) {
        found.name = take();
      }
    }
    if (!aligned) found.alignment = size_of(found.type);
    return found;
  }

  void initialiser(Declaration& to) {
    const bool braces = accept("{");
    do {
      if (!is_number(text()) && !next_is("-")) {
        to.initial_symbol = take();
        continue;
      }
      to.initial.push_back(number(to.type));
    } while (braces && (accept(",") || !next_is("}")));
    if (braces) expect("}");
  }

  void variable(const Declaration& declared, bool writable) {
    if (!declared.initial_symbol.empty()) fail("variable initialised with the address " + declared.initial_symbol);
    Variable& made = program_.variables[declared.name];
    made.name = declared.name;
    made.size = uint64_t(declared.bytes());
    made.writable = writable;
    made.initial.assign(made.size, 0);
    const size_t width = size_t(size_of(declared.type));
    for (size_t i = 0; i < declared.initial.size() && (i + 1) * width <= made.size; ++i) {
      std::memcpy(&made.initial[i * width], &declared.initial[i], width);
    }
    constexpr uint64_t alignment = 256;
    made.storage = std::make_unique<uint8_t[]>(made.size + alignment);
    made.address = (reinterpret_cast<uint64_t>(made.storage.get()) + alignment - 1) / alignment * alignment;
  }

  // --- a kernel ---

  void entry() {
    kernel_ = &program_.kernels[text()];
    kernel_->name = take();
    scopes_.assign(1, {});
    labels_.clear();
    branches_.clear();
    constants_.clear();
    special_.clear();
    predicates_.clear();
    of_64_bits_.clear();
    symbols_.clear();
    source_ = {};
    if (accept("(")) parameters();
    while (!next_is("{")) ++at_;
    lay_out_shared_memory();
    const size_t begin = at_;
    try {
      body();
    } catch (const UnsupportedError& reason) {
      kernel_->unsupported = reason.what();
      at_ = begin;
      skip_braces();
    }
  }

  void parameters() {
    int offset = 0;
    while (!accept(")")) {
      if (accept(",")) continue;
      expect(".param");
      Parameter parameter;
      int64_t elements = 1;
      int alignment = 0;
      while (!next_is(",") && !next_is(")")) {
        if (accept(".align")) {
          alignment = int(integer());
        } else if (accept(".ptr")) {
          while (text()[0] == '.' && !next_is(".align")) ++at_;
          if (accept(".align")) integer();  // of what the pointer points to
        } else if (accept(".attribute")) {
          while (!accept(")")) ++at_;
        } else if (accept("[")) {
          elements = int64_t(integer());
          expect("]");
        } else if (text()[0] == '.') {
          if (const auto type = type_named(text().substr(1))) parameter.type = *type;
          ++at_;
        } else {
          parameter.name = take();
        }
      }
      parameter.size = int(elements * size_of(parameter.type));
      parameter.offset = offset = align_up(offset, alignment ? alignment : size_of(parameter.type));
      offset += parameter.size;
      symbols_[parameter.name] = {Space::param, parameter.offset};
      kernel_->parameters.push_back(parameter);
    }
    kernel_->parameter_bytes = offset;
  }

  // Static variables first, those of module scope before those of the body; dynamic memory starts behind them.
  void lay_out_shared_memory() {
    std::vector<std::string> dynamic;
    const auto place = [&](const Declaration& declared) {
      if (declared.external || declared.elements == 0) {
        dynamic.push_back(declared.name);
        return;
      }
      kernel_->static_shared = align_up(kernel_->static_shared, declared.alignment);
      symbols_[declared.name] = {Space::shared, kernel_->static_shared};
      kernel_->static_shared += int(declared.bytes());
    };
    for (const auto& [name, declared] : shared_of_module_) place(declared);
    const size_t begin = at_;
    int depth = 0;
    do {
      depth += next_is("{") ? 1 : next_is("}") ? -1 : 0;
      if (accept(".shared")) {
        place(declaration(false));
      } else {
        ++at_;
      }
    } while (depth && !at_end());
    at_ = begin;
    kernel_->dynamic_shared_at = align_up(kernel_->static_shared, 128);
    for (const std::string& name : dynamic) symbols_[name] = {Space::shared, kernel_->dynamic_shared_at};
  }

  void body() {
    size_t depth = 0;
    do {
      if (accept("{")) {
        scopes_.push_back({});
        ++depth;
      } else if (accept("}")) {
        scopes_.pop_back();
        --depth;
      } else if (accept(";")) {
      } else if (accept(".reg")) {
        registers();
      } else if (accept(".local")) {
        local(declaration(false));
      } else if (next_is(".shared") || next_is(".pragma")) {
        skip_to_semicolon();
      } else if (text().rfind(".loc", 0) == 0) {
        std::sscanf(take().c_str(), ".loc %d %d", &source_.file, &source_.line);
      } else if (text()[0] == '.') {
        throw UnsupportedError("PTX line " + std::to_string(line()) + ": unsupported directive " + text() +
                               (next_is(".param") ? ": a function call" : ""));
      } else if (tokens_[at_ + 1].text == ":") {
        labels_[text()] = int(kernel_->code.size());
        at_ += 2;
      } else {
        instruction();
      }
    } while (depth && !at_end());
    if (depth) fail("the text ends too early");
    for (const auto& [index, label] : branches_) {
      Instruction& branch = kernel_->code[size_t(index)];
      const auto target = labels_.find(label);
      if (target == labels_.end()) fail("unknown label " + label, branch.line);
      branch.target = target->second;
    }
    end_of_kernel();
  }

  // Running off the end returns.
  void end_of_kernel() {
    Instruction last;
    last.flow = Flow::exit;
    last.line = line();
    last.text = "ret";
    last.mnemonic = mnemonic_index("ret");
    kernel_->code.push_back(last);
  }

  void local(const Declaration& declared) {
    kernel_->local_bytes = align_up(kernel_->local_bytes, declared.alignment);
    symbols_[declared.name] = {Space::local, kernel_->local_bytes};
    kernel_->local_bytes += int(declared.bytes());
  }

  // .reg .b32 %r<12>, %x;
  void registers() {
    bool predicates = false, wide = false;
    for (; text()[0] == '.'; ++at_) {
      predicates = predicates || next_is(".pred");
      if (const auto type = type_named(text().substr(1))) wide = size_of(*type) == 8;
    }
    const auto declare = [&](const std::string& name) {
      const Row row = scopes_.back()[name] = new_row();
      if (predicates) predicates_.insert(row);
      if (wide) of_64_bits_.insert(row);
    };
    do {
      const std::string name = take();
      if (accept("<")) {
        const int count = int(integer());
        expect(">");
        for (int i = 0; i < count; ++i) declare(name + std::to_string(i));
      } else {
        declare(name);
      }
    } while (accept(","));
    expect(";");
  }

  void instruction() {
    Instruction made;
    made.line = line();
    made.source = source_;
    const size_t begin = at_;
    if (accept("@")) {
      made.guard_negated = accept("!");
      made.guard = find_register(text());
      if (made.guard == NO_ROW) fail("unknown predicate '" + text() + "'");
      ++at_;
    }
    const Mnemonic mnemonic(take());
    describe(mnemonic, made);
    constants_are_ = made.type;
    try {
      instruction_set().find(mnemonic)(mnemonic, *this, made);
    } catch (const UnsupportedError& reason) {
      throw UnsupportedError("PTX line " + std::to_string(made.line) + ": " + reason.what());
    }
    if (made.flow == Flow::branch) branches_.emplace_back(int(kernel_->code.size()), label());
    if (!next_is(";")) {
      throw UnsupportedError("PTX line " + std::to_string(made.line) + ": unexpected '" + text() + "' in " +
                             mnemonic.text);
    }
    for (size_t i = begin; i < at_; ++i) {
      const std::string& following = tokens_[i + 1].text;
      made.text += tokens_[i].text;
      if (following == "," || following == ";" || tokens_[i].text == "[" || following == "]") continue;
      made.text += tokens_[i].text == "@" || tokens_[i].text == "!" ? "" : " ";
    }
    ++at_;
    kernel_->code.push_back(std::move(made));
  }

  // What most instructions have in common.
  void describe(const Mnemonic& mnemonic, Instruction& made) {
    if (!mnemonic.types.empty()) {
      made.type = mnemonic.types.front();
      made.source_type = mnemonic.types.back();
    }
    made.flush = mnemonic.has("ftz");
    made.saturate = mnemonic.has("sat");
    made.relu = mnemonic.has("relu");
    made.propagate_nan = mnemonic.has("NaN");
    made.transposed = mnemonic.has("trans");
    made.to_integer = mnemonic.has("rni") || mnemonic.has("rzi") || mnemonic.has("rmi") || mnemonic.has("rpi");
    made.rounding = mnemonic.has("rz") || mnemonic.has("rzi")   ? Rounding::zero
                    : mnemonic.has("rm") || mnemonic.has("rmi") ? Rounding::down
                    : mnemonic.has("rp") || mnemonic.has("rpi") ? Rounding::up
                    : mnemonic.has("rna")                       ? Rounding::nearest_away
                                                                : Rounding::nearest;
    for (const std::string& modifier : mnemonic.modifiers) {
      if (modifier == "global") made.space = Space::global;
      if (modifier == "const") made.space = Space::constant;
      if (modifier == "local") made.space = Space::local;
      if (modifier.rfind("shared", 0) == 0) made.space = Space::shared;
      if (modifier.rfind("param", 0) == 0) made.space = Space::param;
    }
    made.mnemonic = mnemonic_index(mnemonic.text);
  }

  int mnemonic_index(const std::string& name) {
    const auto [found, is_new] = mnemonic_indices_.emplace(name, int(program_.mnemonics.size()));
    if (is_new) program_.mnemonics.push_back(name);
    return found->second;
  }

  // --- rows of the register file ---

  Row new_row() { return kernel_->rows++; }

  Row constant(uint64_t value) {
    const auto [found, is_new] = constants_.emplace(value, NO_ROW);
    if (is_new) {
      found->second = new_row();
      kernel_->immediates.emplace_back(found->second, value);
    }
    return found->second;
  }

  Row special_row(Special which) {
    const auto [found, is_new] = special_.emplace(which, NO_ROW);
    if (is_new) {
      found->second = new_row();
      kernel_->special.emplace_back(found->second, which);
    }
    return found->second;
  }

  Row find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    }
    return NO_ROW;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  Program program_;
  std::map<std::string, Declaration> shared_of_module_;
  std::map<std::string, int> mnemonic_indices_;

  // of the kernel being read
  Kernel* kernel_ = nullptr;
  std::vector<std::map<std::string, Row>> scopes_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<int, std::string>> branches_;
  std::map<uint64_t, Row> constants_;
  std::map<Special, Row> special_;
  std::set<Row> predicates_, of_64_bits_;
  std::map<std::string, Symbol> symbols_;
  Type constants_are_ = Type::b32;
  Source source_;
};

}  // namespace

Program parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
