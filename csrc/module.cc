// The Python module pennyweight._native: checks arguments, releases the GIL where work is long, calls the kernels.
#include "module.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace nb = nanobind;

namespace pennyweight {

const Kernels& table(const std::string& name) {
  static Kernels tables[kMaxInstructionSets];
  static const std::size_t count = kernel_tables(tables);
  for (std::size_t i = 0; i < count; ++i) {
    if (name == tables[i].name) return tables[i];
  }
  throw std::invalid_argument("no kernels called " + name + " run on this processor");
}

}  // namespace pennyweight

namespace {

using pennyweight::table;

using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Strided = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Indices = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename Array>
void expect(const Array& array, std::size_t rows, std::size_t columns, const char* name) {
  if (array.shape(0) != rows || array.shape(1) != columns) {
    throw std::invalid_argument(std::string(name) + ": shape [" + std::to_string(array.shape(0)) + ", " +
                                std::to_string(array.shape(1)) + "], expected [" + std::to_string(rows) + ", " +
                                std::to_string(columns) + "]");
  }
}

// [2, count]: rising values, and the thresholds between them with one number more.
pennyweight::Table table_of(const std::optional<ConstMatrix>& given) {
  if (!given) return {nullptr, nullptr, 0};
  if (given->shape(1) == 0) throw std::invalid_argument("a table of no values was given");
  expect(*given, 2, given->shape(1), "table");
  return {given->data(), given->data() + given->shape(1), given->shape(1)};
}

void round_block(Matrix targets, ConstMatrix weights, Matrix values, Matrix errors, Strided lower, ConstMatrix scales,
                 std::optional<ConstMatrix> zeros, std::optional<ConstMatrix> offsets, Indices groups, float smallest,
                 float largest, std::optional<ConstMatrix> element, int stored, const std::string& kernels) {
  const std::size_t columns = targets.shape(0);
  const std::size_t rows = targets.shape(1);
  expect(weights, columns, rows, "weights");
  expect(values, columns, rows, "values");
  expect(errors, columns, rows, "errors");
  expect(lower, columns, columns, "lower");
  expect(scales, scales.shape(0), rows, "scales");
  if (zeros) expect(*zeros, scales.shape(0), rows, "zeros");
  if (offsets) expect(*offsets, scales.shape(0), rows, "offsets");
  if (zeros && offsets) throw std::invalid_argument("zeros and offsets: at most one of both is expected");
  if (columns > 0 && (lower.stride(1) != 1 || lower.stride(0) < 0)) {
    throw std::invalid_argument("lower: the columns of a row must lie side by side");
  }
  if (groups.shape(0) != columns) throw std::invalid_argument("groups: one for each column is expected");
  for (std::size_t i = 0; i < columns; ++i) {
    if (groups(i) < 0 || static_cast<std::size_t>(groups(i)) >= scales.shape(0)) {
      throw std::invalid_argument("groups: an index is outside the scales");
    }
  }
  if (stored < 0 || stored > 2) throw std::invalid_argument("stored: 0, 1 or 2 is expected");
  const pennyweight::Kernels& chosen = table(kernels);
  const pennyweight::RoundBlock block{targets.data(),
                                      weights.data(),
                                      values.data(),
                                      errors.data(),
                                      lower.data(),
                                      static_cast<std::size_t>(columns > 0 ? lower.stride(0) : 0),
                                      scales.data(),
                                      zeros ? zeros->data() : nullptr,
                                      offsets ? offsets->data() : nullptr,
                                      groups.data(),
                                      columns,
                                      rows,
                                      smallest,
                                      largest,
                                      table_of(element),
                                      static_cast<pennyweight::Stored>(stored)};
  nb::gil_scoped_release release;
  chosen.round_block(block);
}

using Vector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void search_groups(ConstMatrix w, std::optional<ConstMatrix> importance, Vector scales, std::optional<Vector> zeros,
                   ConstMatrix factors, float smallest, float largest, float limit, float tiny, int stored,
                   std::optional<ConstMatrix> element, std::optional<ConstMatrix> scale,
                   std::optional<ConstVector> parents, const std::string& kernels) {
  const std::size_t groups = w.shape(0);
  const std::size_t size = w.shape(1);
  if (importance && (importance->shape(0) == 0 || importance->shape(1) != size)) {
    throw std::invalid_argument("importance: the groups of w have another size");
  }
  if (scales.shape(0) != groups || (zeros && zeros->shape(0) != groups)) {
    throw std::invalid_argument("scales and zeros: one for each group is expected");
  }
  if (parents && parents->shape(0) != groups) throw std::invalid_argument("parents: one for each group is expected");
  if (element && zeros) throw std::invalid_argument("zeros: a table has none");
  expect(factors, factors.shape(0), zeros ? 2 : 1, "factors");
  if (stored < 0 || stored > 2) throw std::invalid_argument("stored: 0, 1 or 2 is expected");
  const pennyweight::Kernels& chosen = table(kernels);
  const pennyweight::SearchGroups search{w.data(),
                                         importance ? importance->data() : nullptr,
                                         scales.data(),
                                         zeros ? zeros->data() : nullptr,
                                         factors.data(),
                                         factors.shape(0),
                                         groups,
                                         size,
                                         importance ? importance->shape(0) : 0,
                                         smallest,
                                         largest,
                                         limit,
                                         tiny,
                                         table_of(element),
                                         table_of(scale),
                                         parents ? parents->data() : nullptr,
                                         static_cast<pennyweight::Stored>(stored)};
  nb::gil_scoped_release release;
  chosen.search_groups(search);
}

// A field as Python gives it: values, parents, stored, smallest, largest, limit, parent_limit, tiny, parent_tiny.
using FieldArguments = std::tuple<Vector, std::optional<Vector>, int, float, float, float, float, float, float>;

pennyweight::Field field_of(const FieldArguments& given, std::size_t groups, std::size_t span) {
  const auto& [values, parents, stored, smallest, largest, limit, parent_limit, tiny, parent_tiny] = given;
  if (values.shape(0) != groups) throw std::invalid_argument("values: one for each group is expected");
  if (parents && parents->shape(0) * span != groups) {
    throw std::invalid_argument("parents: one for each span of groups is expected");
  }
  if (stored < 0 || stored > 2) throw std::invalid_argument("stored: 0, 1 or 2 is expected");
  return {values.data(),
          parents ? parents->data() : nullptr,
          static_cast<pennyweight::Stored>(stored),
          smallest,
          largest,
          limit,
          parent_limit,
          tiny,
          parent_tiny};
}

bool search_nested(ConstMatrix w, std::optional<ConstMatrix> importance, const FieldArguments& scale,
                   const std::optional<FieldArguments>& offset, ConstMatrix factors, ConstVector shares,
                   std::size_t tried, float reach, bool is_thorough, std::size_t span, float smallest, float largest,
                   std::optional<ConstMatrix> element, const std::string& kernels) {
  constexpr std::size_t kAlignment = 64;
  const std::size_t groups = w.shape(0);
  const std::size_t size = w.shape(1);
  if (importance && (importance->shape(0) == 0 || importance->shape(1) != size)) {
    throw std::invalid_argument("importance: the groups of w have another size");
  }
  if (span == 0 || pennyweight::kGroupsAtOnce % span != 0 || groups % span != 0) {
    throw std::invalid_argument("span: 1, 2, 4, 8 or 16, and a divisor of the groups is expected");
  }
  expect(factors, factors.shape(0), offset ? 2 : 1, "factors");
  if (tried < 1 || tried > 4) throw std::invalid_argument("tried: 1 to 4 is expected");
  const pennyweight::Kernels& chosen = table(kernels);
  std::vector<float> scratch(2 * size * pennyweight::kGroupsAtOnce + kAlignment / sizeof(float));
  void* aligned = scratch.data();
  std::size_t space = scratch.size() * sizeof(float);
  std::align(kAlignment, space - kAlignment, aligned, space);
  const pennyweight::SearchNested search{w.data(),
                                         importance ? importance->data() : nullptr,
                                         factors.data(),
                                         factors.shape(0),
                                         shares.data(),
                                         shares.shape(0),
                                         tried,
                                         reach,
                                         is_thorough,
                                         groups,
                                         size,
                                         importance ? importance->shape(0) : 0,
                                         span,
                                         smallest,
                                         largest,
                                         table_of(element),
                                         field_of(scale, groups, span),
                                         offset ? field_of(*offset, groups, span) : pennyweight::Field{},
                                         static_cast<float*>(aligned)};
  nb::gil_scoped_release release;
  return chosen.search_nested(search);
}

// float32, or bfloat16 given as uint16.
using Weights = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

bool is_bfloat16(const Weights& w) {
  if (w.dtype() == nb::dtype<float>()) return false;
  if (w.dtype() == nb::dtype<std::uint16_t>()) return true;
  throw std::invalid_argument("w: float32, or bfloat16 as uint16, is expected");
}

void range_groups(Weights w, Vector low, Vector high, const std::string& kernels) {
  const std::size_t groups = w.shape(0);
  const std::size_t size = w.shape(1);
  if (low.shape(0) != groups || high.shape(0) != groups) {
    throw std::invalid_argument("low and high: one for each group is expected");
  }
  if (size == 0) throw std::invalid_argument("w: groups of at least one weight are expected");
  const pennyweight::Kernels& chosen = table(kernels);
  const bool narrow = is_bfloat16(w);
  const void* weights = w.data();
  float* least = low.data();
  float* most = high.data();
  nb::gil_scoped_release release;
  chosen.range_groups(weights, narrow, groups, size, least, most);
}

using Codes = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void encode_groups(Weights w, ConstVector scales, std::optional<ConstVector> zeros, Codes codes, float smallest,
                   float largest, const std::string& kernels) {
  const std::size_t groups = w.shape(0);
  const std::size_t size = w.shape(1);
  expect(codes, groups, size, "codes");
  if (scales.shape(0) != groups || (zeros && zeros->shape(0) != groups)) {
    throw std::invalid_argument("scales and zeros: one for each group is expected");
  }
  if (!(largest - smallest >= 0.0f && largest - smallest <= 255.0f)) {
    throw std::invalid_argument("smallest and largest: at most 256 values are expected");
  }
  const pennyweight::Kernels& chosen = table(kernels);
  const pennyweight::EncodeGroups encode{w.data(),     is_bfloat16(w), scales.data(), zeros ? zeros->data() : nullptr,
                                         codes.data(), groups,         size,          smallest,
                                         largest};
  nb::gil_scoped_release release;
  chosen.encode_groups(encode);
}

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void pack_nibbles(ConstBytes codes, Bytes packed, const std::string& kernels) {
  const std::size_t bytes = packed.shape(0);
  if (codes.shape(0) != 2 * bytes) throw std::invalid_argument("codes: two for each byte are expected");
  const pennyweight::Kernels& chosen = table(kernels);
  const std::uint8_t* from = codes.data();
  std::uint8_t* to = packed.data();
  nb::gil_scoped_release release;
  chosen.pack_nibbles(from, bytes, to);
}

using Halves = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Panels = nb::ndarray<std::uint32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ConstPanels = nb::ndarray<const std::uint32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

const pennyweight::Kernels& multiplying(const std::string& kernels) {
  const pennyweight::Kernels& chosen = table(kernels);
  if (chosen.pair_rows == nullptr) throw std::invalid_argument(kernels + ": these kernels do not multiply bfloat16");
  return chosen;
}

template <typename Array>
void expect_panels(const Array& panels, std::size_t columns, std::size_t rows) {
  if (panels.shape(0) * pennyweight::kPanelColumns != columns || panels.shape(1) != (rows + 1) / 2 ||
      panels.shape(2) != pennyweight::kPanelColumns) {
    throw std::invalid_argument("panels: [columns / 64, pairs of rows, 64] are expected");
  }
}

void pair_rows(Halves x, std::size_t panel, Panels panels, const std::string& kernels) {
  const std::size_t rows = x.shape(0);
  const std::size_t columns = x.shape(1);
  expect_panels(panels, columns, rows);
  if (panel >= panels.shape(0)) throw std::invalid_argument("panel: there is none of this number");
  const pennyweight::Kernels& chosen = multiplying(kernels);
  const std::uint16_t* from = x.data();
  std::uint32_t* to = panels.data() + panel * panels.shape(1) * pennyweight::kPanelColumns;
  nb::gil_scoped_release release;
  chosen.pair_rows(from, rows, columns, panel, to);
}

void add_products(ConstPanels panels, Matrix total, std::size_t left_begin, std::size_t left_end,
                  std::size_t right_begin, std::size_t right_end, const std::string& kernels) {
  const std::size_t columns = total.shape(0);
  expect(total, columns, columns, "total");
  expect_panels(panels, columns, 2 * panels.shape(1));
  if (left_end > panels.shape(0) || right_end > panels.shape(0)) {
    throw std::invalid_argument("left_end and right_end: panels that are there are expected");
  }
  const pennyweight::Kernels& chosen = multiplying(kernels);
  const pennyweight::AddProducts products{panels.data(), total.data(), columns,     panels.shape(1),
                                          left_begin,    left_end,     right_begin, right_end};
  nb::gil_scoped_release release;
  chosen.add_products(products);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The native kernels of Pennyweight.";
  // Modules of torch hold packed weights until the interpreter ends; nothing is lost with them.
  nb::set_leak_warnings(false);

  module.def("version", [] { return PENNYWEIGHT_VERSION; }, "Version of Pennyweight that this library was built from.");

  module.def(
      "instruction_sets",
      [] {
        const char* names[pennyweight::kMaxInstructionSets];
        const std::size_t count = pennyweight::instruction_sets(names);
        return std::vector<std::string>(names, names + count);
      },
      "Names of the instruction sets that this processor has, of those that kernels may be built for.");

  module.def(
      "kernel_tables",
      [] {
        pennyweight::Kernels tables[pennyweight::kMaxInstructionSets];
        const std::size_t count = pennyweight::kernel_tables(tables);
        std::vector<std::string> names;
        for (std::size_t i = 0; i < count; ++i) names.emplace_back(tables[i].name);
        return names;
      },
      "Names of the kernel tables that this processor can run, best first.");

  module.def(
      "range_groups", &range_groups, nb::arg("w"), nb::arg("low"), nb::arg("high"), nb::arg("kernels"),
      "Smallest and largest of groups [groups, size], float32 or bfloat16 as uint16; `low` and `high` are written.");

  module.def("encode_groups", &encode_groups, nb::arg("w"), nb::arg("scales"), nb::arg("zeros").none(),
             nb::arg("codes"), nb::arg("smallest"), nb::arg("largest"), nb::arg("kernels"),
             "Nearest codes of groups [groups, size], float32 or bfloat16 as uint16; `codes` are written.");

  module.def("pack_nibbles", &pack_nibbles, nb::arg("codes"), nb::arg("packed"), nb::arg("kernels"),
             "Two codes below 16 a byte, the first one low; `packed` is written.");

  module.def("search_groups", &search_groups, nb::arg("w"), nb::arg("importance").none(), nb::arg("scales"),
             nb::arg("zeros").none(), nb::arg("factors"), nb::arg("smallest"), nb::arg("largest"), nb::arg("limit"),
             nb::arg("tiny"), nb::arg("stored"), nb::arg("element").none(), nb::arg("scale").none(),
             nb::arg("parents").none(), nb::arg("kernels"),
             "Search of scales for groups [groups, size]; see kernels.h. `scales` and `zeros` are written.");

  module.def("search_nested", &search_nested, nb::arg("w"), nb::arg("importance").none(), nb::arg("scale"),
             nb::arg("offset").none(), nb::arg("factors"), nb::arg("shares"), nb::arg("tried"), nb::arg("reach"),
             nb::arg("is_thorough"), nb::arg("span"), nb::arg("smallest"), nb::arg("largest"),
             nb::arg("element").none(), nb::arg("kernels"),
             "Search of scales, offsets and their parents for groups [groups, size]; see kernels.h. A field is "
             "(values, parents or None, stored, smallest, largest, limit, parent_limit, tiny, parent_tiny); its values "
             "and parents are written.");

  module.def("pair_rows", &pair_rows, nb::arg("x"), nb::arg("panel"), nb::arg("panels"), nb::arg("kernels"),
             "One of the panels [columns / 64, pairs, 64] of x [rows, columns], bfloat16 as uint16; it is written.");

  module.def("add_products", &add_products, nb::arg("panels"), nb::arg("total"), nb::arg("left_begin"),
             nb::arg("left_end"), nb::arg("right_begin"), nb::arg("right_end"), nb::arg("kernels"),
             "The product of panels, added to `total` [columns, columns] on and above the diagonal; see kernels.h.");

  module.def("round_block", &round_block, nb::arg("targets"), nb::arg("weights"), nb::arg("values"), nb::arg("errors"),
             nb::arg("lower"), nb::arg("scales"), nb::arg("zeros").none(), nb::arg("offsets").none(), nb::arg("groups"),
             nb::arg("smallest"), nb::arg("largest"), nb::arg("element").none(), nb::arg("stored"), nb::arg("kernels"),
             "GPTQ within one block of columns [columns, rows]; see kernels.h. `targets`, `values` and `errors` are "
             "written.");

  bind_packed(module);
  bind_decoder(module);
}
