// What the files that bind functions to Python share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <utility>

#include "kernels.h"
#include "packed_call.h"

namespace pennyweight {

// The kernels of that name; throws std::invalid_argument where this processor has none.
const Kernels& table(const std::string& name);

using ConstBytes = nanobind::ndarray<const std::uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// Packed weights, and the memory that they lie in.
struct PackedMatrix {
  explicit PackedMatrix(ConstBytes bytes)
      : storage(std::move(bytes)), weights(parse_packed(storage.data(), storage.shape(0))) {}
  ConstBytes storage;
  PackedWeights weights;
};

}  // namespace pennyweight

void bind_packed(nanobind::module_& module);
void bind_decoder(nanobind::module_& module);
