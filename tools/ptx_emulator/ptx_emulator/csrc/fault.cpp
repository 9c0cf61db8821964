#include "fault.h"

namespace ptx {

const char* name_of(FaultKind kind) {
  static const char* const names[] = {"out_of_bounds",  "misaligned",  "read_only",
                                      "uninitialised",  "shared_race", "global_race",
                                      "warp_race",      "async_copy",  "divergent_barrier",
                                      "divergent_warp", "deadlock",    "instruction_limit",
                                      "trap",           "matrix",      "barrier"};
  return names[size_t(kind)];
}

void Faults::add(FaultKind kind, const std::string& message, const Where& where) {
  if (!seen_.insert({kind, where.instruction}).second) return;
  Fault fault;
  fault.kind = kind;
  fault.message = message;
  fault.kernel = kernel_.name;
  fault.block = where.block;
  fault.warp = where.warp;
  fault.lane = where.lane;
  fault.address = where.address;
  fault.offset = where.offset;
  fault.buffer = where.buffer;
  if (where.instruction) {
    fault.line = where.instruction->line;
    fault.instruction = where.instruction->text;
    const auto file = program_.files.find(where.instruction->source.file);
    if (file != program_.files.end())
      fault.source = file->second + ":" + std::to_string(where.instruction->source.line);
  }
  found_.push_back(fault);
  if (found_.size() >= most_) throw Stop();
}

}  // namespace ptx
