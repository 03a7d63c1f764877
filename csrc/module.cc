// The Python module pennyweight._native: checks arguments, releases the GIL where work is long, calls the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "kernels.h"

NB_MODULE(_native, module) {
  module.doc() = "The native kernels of Pennyweight.";

  module.def("version", [] { return PENNYWEIGHT_VERSION; }, "Version of Pennyweight that this library was built from.");

  module.def(
      "instruction_sets",
      [] {
        const char* names[pennyweight::kMaxInstructionSets];
        const std::size_t count = pennyweight::instruction_sets(names);
        return std::vector<std::string>(names, names + count);
      },
      "Names of the instruction sets that this processor has, of those that kernels may be built for.");
}
