// The emulator as a Python module. ptx_emulator/__init__.py is its face.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "grid.h"
#include "instruction_set.h"
#include "parser.h"

namespace py = pybind11;

namespace ptx {
namespace {

py::dict describe(const Kernel& kernel) {
  py::list parameters;
  for (const Parameter& p : kernel.parameters) {
    parameters.append(py::make_tuple(p.name, p.offset, p.size, name_of(p.type)));
  }
  py::dict described;
  described["parameters"] = parameters;
  described["parameter_bytes"] = kernel.parameter_bytes;
  described["static_shared"] = kernel.static_shared;
  described["local_bytes"] = kernel.local_bytes;
  described["instructions"] = kernel.code.size();
  described["unsupported"] = kernel.unsupported;
  return described;
}

py::dict describe(const Fault& fault) {
  py::dict described;
  described["kind"] = name_of(fault.kind);
  described["message"] = fault.message;
  described["kernel"] = fault.kernel;
  described["ptx_line"] = fault.line;
  described["instruction"] = fault.instruction;
  described["source"] = fault.source;
  described["block"] = py::make_tuple(fault.block[0], fault.block[1], fault.block[2]);
  described["warp"] = fault.warp;
  described["lane"] = fault.lane;
  described["address"] = fault.address;
  described["buffer"] = fault.buffer;
  described["offset"] = fault.offset;
  return described;
}

Options options_from(const py::dict& given) {
  Options options;
  options.schedule = Schedule(given["schedule"].cast<int>());
  options.seed = given["seed"].cast<uint64_t>();
  options.races = given["races"].cast<bool>();
  options.uninitialised = given["uninitialised"].cast<bool>();
  options.statistics = given["statistics"].cast<bool>();
  options.instruction_limit = given["instruction_limit"].cast<uint64_t>();
  options.max_faults = given["max_faults"].cast<size_t>();
  return options;
}

// (faults, statistics, opcodes)
py::tuple launch(Program& program, const std::string& name, std::array<int, 3> grid_size, std::array<int, 3> block_size,
                 int dynamic_shared, const py::bytes& parameters,
                 const std::vector<std::tuple<uint64_t, uint64_t, std::string, bool>>& buffers,
                 const py::dict& options) {
  const Kernel& kernel = program.kernels.at(name);
  LaunchRequest request;
  request.grid = grid_size;
  request.block = block_size;
  request.dynamic_shared = dynamic_shared;
  const std::string packed = parameters;
  request.parameters.assign(packed.begin(), packed.end());
  for (const auto& [address, size, buffer_name, writable] : buffers) {
    request.buffers.push_back({address, size, buffer_name, writable, {}});
  }
  Grid grid(program, kernel, std::move(request), options_from(options));
  grid.run();

  py::list faults;
  for (const Fault& fault : grid.faults.found()) faults.append(describe(fault));
  py::dict statistics;
  for (const auto& [field, value] : grid.statistics.named()) statistics[field] = value;
  py::dict opcodes;
  for (size_t m = 0; m < grid.executed.size(); ++m) {
    if (grid.executed[m]) opcodes[program.mnemonics[m].c_str()] = grid.executed[m];
  }
  return py::make_tuple(faults, statistics, opcodes);
}

}  // namespace
}  // namespace ptx

PYBIND11_MODULE(_ptx_emulator, m) {
  py::register_exception<ptx::ParseError>(m, "ParseError", PyExc_ValueError);
  py::class_<ptx::Program>(m, "Program").def_property_readonly("kernels", [](const ptx::Program& program) {
    py::dict kernels;
    for (const auto& [name, kernel] : program.kernels) kernels[name.c_str()] = ptx::describe(kernel);
    return kernels;
  });
  m.def("parse", [](const std::string& text) { return std::make_unique<ptx::Program>(ptx::parse(text)); });
  m.def("launch", &ptx::launch);
  m.def("instructions", [] { return ptx::instruction_set().names(); });
}
