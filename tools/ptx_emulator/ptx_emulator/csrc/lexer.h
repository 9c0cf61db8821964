// PTX text to tokens.
#pragma once
#include <string>
#include <vector>

namespace ptx {

struct Token {
  std::string text;
  int line;
};

// Identifiers keep their dots and colons (`ld.global.b32`, `%r1`, `.param`); everything else is one character a token.
// Comments vanish. The directives that end with their line rather than with a semicolon (.loc, .file, .version, ...)
// become one token holding the whole line.
std::vector<Token> tokenize(const std::string& text);

}  // namespace ptx
