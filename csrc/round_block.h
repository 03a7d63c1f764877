// The body of Kernels::round_block, compiled once for each instruction set: the compiler vectorises the loops over
// rows.
#pragma once

#include "kernels.h"
#include "rounding.h"

namespace pennyweight {
namespace {

// Rows worked on at a time: 128 columns of them, targets and errors, stay in the first- and second-level caches.
constexpr std::size_t kRows = 64;

template <Stored kStored>
void round_column(const RoundBlock& b, std::size_t column, std::size_t first, std::size_t count) {
  const std::size_t at = column * b.rows + first;
  const std::size_t group = static_cast<std::size_t>(b.groups[column]) * b.rows + first;
  const float* __restrict target = b.targets + at;
  const float* __restrict weight = b.weights + at;
  const float* __restrict scale = b.scales + group;
  float* __restrict value = b.values + at;
  float* __restrict error = b.errors + at;
  if (b.zeros == nullptr) {
    for (std::size_t r = 0; r < count; ++r) {
      const float v = round_even(min_of(max_of(target[r] / scale[r], b.smallest), b.largest));
      value[r] = v;
      error[r] = weight[r] - stored<kStored>(v * scale[r]);
    }
    return;
  }
  const float* __restrict zero = b.zeros + group;
  for (std::size_t r = 0; r < count; ++r) {
    const float v = round_even(min_of(max_of(target[r] / scale[r] + zero[r], b.smallest), b.largest));
    value[r] = v;
    error[r] = weight[r] - stored<kStored>((v - zero[r]) * scale[r]);
  }
}

template <Stored kStored>
void round_rows(const RoundBlock& b, std::size_t first, std::size_t count) {
  for (std::size_t column = b.columns; column-- > 0;) {
    round_column<kStored>(b, column, first, count);
    const float* __restrict error = b.errors + column * b.rows + first;
    const float* lower = b.lower + column * b.lower_stride;
    for (std::size_t before = 0; before < column; ++before) {
      const float factor = lower[before];
      float* __restrict target = b.targets + before * b.rows + first;
      for (std::size_t r = 0; r < count; ++r) target[r] += factor * error[r];
    }
  }
}

template <Stored kStored>
void round_all(const RoundBlock& b) {
  std::size_t first = 0;
  // A constant count lets the compiler unroll; the tail takes the same path with its own.
  for (; first + kRows <= b.rows; first += kRows) round_rows<kStored>(b, first, kRows);
  if (first < b.rows) round_rows<kStored>(b, first, b.rows - first);
}

void round_block(const RoundBlock& b) {
  if (b.stored == Stored::kBFloat16) return round_all<Stored::kBFloat16>(b);
  if (b.stored == Stored::kFloat16) return round_all<Stored::kFloat16>(b);
  return round_all<Stored::kFloat32>(b);
}

}  // namespace
}  // namespace pennyweight
