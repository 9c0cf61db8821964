// PTX text to a Program.
#pragma once
#include <stdexcept>
#include <string>

#include "program.h"

namespace ptx {

// The text is not PTX as we know it.
struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An instruction, or a form of one, that the emulator does not execute. It makes its kernel unsupported, not the text.
struct UnsupportedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Program parse(const std::string& text);

}  // namespace ptx
