// What the native part offers to module.cc: plain functions over raw pointers and sizes.
// They allocate nothing, throw nothing and start no threads.
#pragma once

#include <cstddef>

namespace pennyweight {

// Upper bound on the names that instruction_sets() writes.
constexpr std::size_t kMaxInstructionSets = 8;

// Writes the names of the instruction sets that this processor has, of those that kernels may be built for, to
// `names` [kMaxInstructionSets]; returns how many. The strings are static.
std::size_t instruction_sets(const char** names);

}  // namespace pennyweight
