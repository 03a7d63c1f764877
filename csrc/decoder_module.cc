// The decoder for Python. Arrays are addresses of contiguous memory that the caller keeps.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.h"
#include "module.h"

namespace nb = nanobind;

namespace {

using pennyweight::FloatKind;
using Address = std::uintptr_t;

const float* floats(Address address) { return reinterpret_cast<const float*>(address); }

FloatKind kind_of(int kind) {
  if (kind != 0 && kind != 1) throw std::invalid_argument("kind: 0 (float32) or 1 (bfloat16) is expected");
  return static_cast<FloatKind>(kind);
}

pennyweight::Linear packed_linear(const pennyweight::PackedMatrix& matrix, Address bias) {
  return {&matrix.weights, nullptr, FloatKind::kFloat32, matrix.weights.rows, matrix.weights.cols, floats(bias)};
}

pennyweight::Linear dense_linear(Address weights, int kind, std::size_t rows, std::size_t cols, Address bias) {
  return {nullptr, reinterpret_cast<const void*>(weights), kind_of(kind), rows, cols, floats(bias)};
}

pennyweight::DecoderBlock block(Address attention_norm, Address query_norm, Address key_norm, Address feed_norm,
                                const std::vector<pennyweight::Linear>& linears, std::size_t window) {
  if (linears.size() != 7) throw std::invalid_argument("linears: query, key, value, out, gate, up, down are expected");
  return {floats(attention_norm),
          floats(query_norm),
          floats(key_norm),
          floats(feed_norm),
          linears[0],
          linears[1],
          linears[2],
          linears[3],
          linears[4],
          linears[5],
          linears[6],
          window};
}

std::unique_ptr<pennyweight::Decoder> decoder(std::size_t hidden, std::size_t heads, std::size_t key_heads,
                                              std::size_t width, std::size_t rotated, float epsilon, float scale,
                                              int activation, bool is_exact, int cache_kind,
                                              std::vector<pennyweight::DecoderBlock> blocks, Address final_norm,
                                              const pennyweight::Linear& head, const std::string& kernels) {
  if (activation != 0 && activation != 1) throw std::invalid_argument("activation: 0 or 1 is expected");
  const pennyweight::DecoderShape shape{hidden,    heads,
                                        key_heads, width,
                                        rotated,   epsilon,
                                        scale,     static_cast<pennyweight::Activation>(activation),
                                        is_exact,  kind_of(cache_kind)};
  return std::make_unique<pennyweight::Decoder>(shape, std::move(blocks), floats(final_norm), head,
                                                *pennyweight::table(kernels).packed);
}

void run(pennyweight::Decoder& self, Address x, std::size_t tokens, Address logits, std::size_t threads) {
  nb::gil_scoped_release release;
  self.run(reinterpret_cast<float*>(x), tokens, reinterpret_cast<float*>(logits), threads);
}

}  // namespace

void bind_decoder(nb::module_& module) {
  nb::class_<pennyweight::Linear>(module, "Linear", "Weights of a linear map of a decoder.");
  nb::class_<pennyweight::DecoderBlock>(module, "DecoderBlock", "Attention and feed-forward part; see decoder.h.");
  module.def("packed_linear", &packed_linear, nb::arg("matrix"), nb::arg("bias"), nb::keep_alive<0, 1>());
  module.def("dense_linear", &dense_linear, nb::arg("weights"), nb::arg("kind"), nb::arg("rows"), nb::arg("cols"),
             nb::arg("bias"));
  module.def("decoder_block", &block, nb::arg("attention_norm"), nb::arg("query_norm"), nb::arg("key_norm"),
             nb::arg("feed_norm"), nb::arg("linears"), nb::arg("window"));
  nb::class_<pennyweight::Decoder>(module, "Decoder", "A decoder of text over packed weights; see decoder.h.")
      .def(nb::new_(&decoder), nb::arg("hidden"), nb::arg("heads"), nb::arg("key_heads"), nb::arg("width"),
           nb::arg("rotated"), nb::arg("epsilon"), nb::arg("scale"), nb::arg("activation"), nb::arg("is_exact"),
           nb::arg("cache_kind"), nb::arg("blocks"), nb::arg("final_norm"), nb::arg("head"), nb::arg("kernels"))
      .def(
          "reserve",
          [](pennyweight::Decoder& self, std::size_t positions, Address cosines, Address sines) {
            self.reserve(positions, floats(cosines), floats(sines));
          },
          nb::arg("positions"), nb::arg("cosines"), nb::arg("sines"))
      .def_prop_ro("length", &pennyweight::Decoder::length)
      .def(
          "copy",
          [](const pennyweight::Decoder& self, std::size_t block, Address keys, Address values) {
            self.copy(block, reinterpret_cast<float*>(keys), reinterpret_cast<float*>(values));
          },
          nb::arg("block"), nb::arg("keys"), nb::arg("values"))
      .def("run", &run, nb::arg("x"), nb::arg("tokens"), nb::arg("logits"), nb::arg("threads"),
           "Embeddings x [tokens, hidden] of the next tokens, changed; logits after the last, or 0.");
}
