#include "lexer.h"

#include <algorithm>
#include <cctype>

namespace ptx {
namespace {

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.' || c == '%';
}

bool takes_whole_line(const std::string& word) {
  return word == ".loc" || word == ".file" || word == ".version" || word == ".target" || word == ".address_size";
}

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (std::isspace(static_cast<unsigned char>(c))) {
        advance_to(at_ + 1);
      } else if (starts_with("//")) {
        advance_to(text_.find('\n', at_));
      } else if (starts_with("/*")) {
        const size_t end = text_.find("*/", at_ + 2);
        advance_to(end == std::string::npos ? end : end + 2);
      } else if (c == '"') {
        take(end_of_string());
      } else if (is_word(c)) {
        word();
      } else {
        take(at_ + 1);
      }
    }
    return std::move(tokens_);
  }

 private:
  bool starts_with(const char* what) const {
    return text_.compare(at_, std::char_traits<char>::length(what), what) == 0;
  }

  void advance_to(size_t end) {
    end = std::min(end, text_.size());
    line_ += int(std::count(text_.begin() + long(at_), text_.begin() + long(end), '\n'));
    at_ = end;
  }

  void take(size_t end) {
    end = std::min(end, text_.size());
    tokens_.push_back({text_.substr(at_, end - at_), line_});
    advance_to(end);
  }

  size_t end_of_string() const {
    size_t end = at_ + 1;
    while (end < text_.size() && text_[end] != '"') end += text_[end] == '\\' ? 2 : 1;
    return end + 1;
  }

  void word() {
    size_t end = at_;
    while (end < text_.size() && (is_word(text_[end]) || text_.compare(end, 2, "::") == 0)) {
      end += is_word(text_[end]) ? 1 : 2;
    }
    if (takes_whole_line(text_.substr(at_, end - at_))) end = text_.find('\n', at_);
    take(end);
  }

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(const std::string& text) { return Lexer(text).run(); }

}  // namespace ptx
