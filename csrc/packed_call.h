// Products with packed weights over several threads, for module.cc and whoever runs whole models.
#pragma once

#include <vector>

#include "packed.h"

namespace pennyweight {

// What a header of packed weights says (see pennyweight.kernels.layout). Throws std::invalid_argument where `storage`
// is not whole. The weights refer to it.
PackedWeights parse_packed(const std::uint8_t* storage, std::size_t bytes);

// One of several products with the same input.
struct Product {
  const PackedWeights* weights;
  const float* bias;  // [rows], or null
  void* out;          // [rows of the input, rows of the weights], of the type of the input
};

// x [rows, cols] times all of `products`, whose columns must be those of `x`.
void multiply_packed(const void* x, FloatKind kind, std::size_t rows, std::size_t cols, bool is_exact,
                     const std::vector<Product>& products, std::size_t threads, const PackedKernels& kernels);

// A plain read of memory by several threads; a digest of the bytes.
std::uint64_t read_memory(const std::uint8_t* bytes, std::size_t count, std::size_t threads,
                          const PackedKernels& kernels);

}  // namespace pennyweight
