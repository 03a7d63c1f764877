// Packed weights for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"
#include "packed_call.h"

namespace nb = nanobind;

namespace {

using pennyweight::PackedMatrix;
using Bytes = pennyweight::ConstBytes;

const pennyweight::PackedKernels& packed_table(const std::string& kernels) {
  return *pennyweight::table(kernels).packed;
}

// Addresses instead of arrays: looking at an array takes longer than a small product. The caller has checked them.
void multiply(std::uintptr_t x, std::size_t rows, std::size_t cols, const std::vector<const PackedMatrix*>& matrices,
              const std::vector<std::uintptr_t>& biases, const std::vector<std::uintptr_t>& outs, int kind,
              bool is_exact, std::size_t threads, const std::string& kernels) {
  if (kind < 0 || kind > 2) throw std::invalid_argument("kind: 0, 1 or 2 is expected");
  if (biases.size() != matrices.size() || outs.size() != matrices.size()) {
    throw std::invalid_argument("biases and outs: one for each matrix is expected");
  }
  std::vector<pennyweight::Product> products;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const pennyweight::PackedWeights& weights = matrices[i]->weights;
    if (weights.cols != cols) throw std::invalid_argument("x: the columns of the weights are expected");
    products.push_back({&weights, reinterpret_cast<const float*>(biases[i]), reinterpret_cast<void*>(outs[i])});
  }
  const pennyweight::PackedKernels& chosen = packed_table(kernels);
  const void* from = reinterpret_cast<const void*>(x);
  nb::gil_scoped_release release;
  pennyweight::multiply_packed(from, static_cast<pennyweight::FloatKind>(kind), rows, cols, is_exact, products, threads,
                               chosen);
}

std::uint64_t digest(Bytes bytes, std::size_t threads, const std::string& kernels) {
  const pennyweight::PackedKernels& chosen = packed_table(kernels);
  nb::gil_scoped_release release;
  return pennyweight::read_memory(bytes.data(), bytes.shape(0), threads, chosen);
}

}  // namespace

void bind_packed(nb::module_& module) {
  nb::class_<PackedMatrix>(module, "Packed", "Packed weights; see pennyweight.kernels.layout.")
      .def(nb::init<Bytes>(), nb::arg("storage"));

  module.def("packed_multiply", &multiply, nb::arg("x"), nb::arg("rows"), nb::arg("cols"), nb::arg("matrices"),
             nb::arg("biases"), nb::arg("outs"), nb::arg("kind"), nb::arg("is_exact"), nb::arg("threads"),
             nb::arg("kernels"),
             "x [rows, cols] times several packed weights; `outs` [rows, rows of the weights] are written. Arrays are "
             "addresses of contiguous memory: `x` and `outs` float32, bfloat16 or float16 (`kind` 0, 1, 2), `biases` "
             "float32 [rows of the weights], or 0.");

  module.def("read_memory", &digest, nb::arg("memory"), nb::arg("threads"), nb::arg("kernels"),
             "A digest of bytes: a plain read of memory, to compare with.");
}
