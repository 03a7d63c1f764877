// What the files that bind functions to Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"

namespace pennyweight {

// The kernels of that name; throws std::invalid_argument where this processor has none.
const Kernels& table(const std::string& name);

}  // namespace pennyweight

void bind_packed(nanobind::module_& module);
