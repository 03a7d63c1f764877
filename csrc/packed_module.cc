// Packed weights for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"
#include "packed_call.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// float32, or half precision as uint16.
using Numbers = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const pennyweight::PackedKernels& packed_table(const std::string& kernels) {
  return *pennyweight::table(kernels).packed;
}

// Packed weights, and the memory that they lie in.
struct Packed {
  explicit Packed(Bytes bytes)
      : storage(std::move(bytes)), weights(pennyweight::parse_packed(storage.data(), storage.shape(0))) {}
  Bytes storage;
  pennyweight::PackedWeights weights;
};

void check(const Numbers& numbers, std::size_t rows, std::size_t cols, pennyweight::FloatKind kind, const char* name) {
  const bool is_wide = kind == pennyweight::FloatKind::kFloat32;
  if (numbers.dtype() != (is_wide ? nb::dtype<float>() : nb::dtype<std::uint16_t>())) {
    throw std::invalid_argument(std::string(name) + ": float32, or half precision as uint16, is expected");
  }
  if (numbers.shape(0) != rows || numbers.shape(1) != cols) {
    throw std::invalid_argument(std::string(name) + ": another shape is expected");
  }
}

void multiply(Numbers x, const std::vector<const Packed*>& matrices, const std::vector<std::optional<Vector>>& biases,
              const std::vector<Numbers>& outs, int kind, bool is_exact, std::size_t threads,
              const std::string& kernels) {
  if (kind < 0 || kind > 2) throw std::invalid_argument("kind: 0, 1 or 2 is expected");
  if (biases.size() != matrices.size() || outs.size() != matrices.size()) {
    throw std::invalid_argument("biases and outs: one for each matrix is expected");
  }
  const auto type = static_cast<pennyweight::FloatKind>(kind);
  const std::size_t rows = x.shape(0), cols = x.shape(1);
  check(x, rows, cols, type, "x");
  std::vector<pennyweight::Product> products;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const pennyweight::PackedWeights& weights = matrices[i]->weights;
    if (weights.cols != cols) throw std::invalid_argument("x: the columns of the weights are expected");
    check(outs[i], rows, weights.rows, type, "outs");
    if (biases[i] && biases[i]->shape(0) != weights.rows) throw std::invalid_argument("biases: one a row is expected");
    products.push_back({&weights, biases[i] ? biases[i]->data() : nullptr, outs[i].data()});
  }
  const pennyweight::PackedKernels& chosen = packed_table(kernels);
  const void* from = x.data();
  nb::gil_scoped_release release;
  pennyweight::multiply_packed(from, type, rows, cols, is_exact, products, threads, chosen);
}

std::uint64_t digest(Bytes bytes, std::size_t threads, const std::string& kernels) {
  const pennyweight::PackedKernels& chosen = packed_table(kernels);
  nb::gil_scoped_release release;
  return pennyweight::read_memory(bytes.data(), bytes.shape(0), threads, chosen);
}

}  // namespace

void bind_packed(nb::module_& module) {
  nb::class_<Packed>(module, "Packed", "Packed weights; see pennyweight.kernels.layout.")
      .def(nb::init<Bytes>(), nb::arg("storage"));

  module.def("packed_multiply", &multiply, nb::arg("x"), nb::arg("matrices"), nb::arg("biases"), nb::arg("outs"),
             nb::arg("kind"), nb::arg("is_exact"), nb::arg("threads"), nb::arg("kernels"),
             "x [rows, cols] times several packed weights; `outs` [rows, rows of the weights] are written. `kind`: 0 "
             "float32, 1 bfloat16, 2 float16, the last two as uint16.");

  module.def("read_memory", &digest, nb::arg("memory"), nb::arg("threads"), nb::arg("kernels"),
             "A digest of bytes: a plain read of memory, to compare with.");
}
