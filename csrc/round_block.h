// The body of Kernels::round_block, compiled once for each instruction set: the compiler vectorises the loops over
// rows.
#pragma once

#include "kernels.h"
#include "rounding.h"

namespace pennyweight {
namespace {

// Rows worked on at a time.
constexpr std::size_t kRows = 64;
// Columns whose errors go to the columns before them together: each of these is then read and written once.
constexpr std::size_t kTogether = 8;
// Columns of which the targets of kRows rows are kept side by side, in the first-level cache.
constexpr std::size_t kColumns = 128;

// The targets of some rows: column j at `at + j * stride`.
struct Strip {
  float* at;
  std::size_t stride;
};

// The values of the number format that are nearest to `x` [count], count <= kRows; `x` is edited.
template <bool kTable>
inline void nearest_values(const RoundBlock& b, float* __restrict x, float* __restrict value, std::size_t count) {
  if constexpr (!kTable) {
    for (std::size_t r = 0; r < count; ++r) value[r] = round_even(min_of(max_of(x[r], b.smallest), b.largest));
    return;
  }
  for (std::size_t r = 0; r < count; ++r) value[r] = b.element.values[0];
  for (std::size_t v = 1; v < b.element.count; ++v) {
    const float threshold = b.element.thresholds[v - 1], next = b.element.values[v];
    for (std::size_t r = 0; r < count; ++r) value[r] = x[r] > threshold ? next : value[r];
  }
}

template <Stored kStored, bool kTable>
inline void round_column(const RoundBlock& b, const float* __restrict target, std::size_t column, std::size_t first,
                         std::size_t count) {
  const std::size_t at = column * b.rows + first;
  const std::size_t group = static_cast<std::size_t>(b.groups[column]) * b.rows + first;
  const float* __restrict weight = b.weights + at;
  const float* __restrict scale = b.scales + group;
  float* __restrict value = b.values + at;
  float* __restrict error = b.errors + at;
  float scaled[kRows];
  if (b.zeros != nullptr) {
    const float* __restrict zero = b.zeros + group;
    for (std::size_t r = 0; r < count; ++r) scaled[r] = target[r] / scale[r] + zero[r];
    nearest_values<kTable>(b, scaled, value, count);
    for (std::size_t r = 0; r < count; ++r) error[r] = weight[r] - stored<kStored>((value[r] - zero[r]) * scale[r]);
  } else if (b.offsets != nullptr) {
    const float* __restrict offset = b.offsets + group;
    for (std::size_t r = 0; r < count; ++r) scaled[r] = (target[r] + offset[r]) / scale[r];
    nearest_values<kTable>(b, scaled, value, count);
    for (std::size_t r = 0; r < count; ++r) error[r] = weight[r] - stored<kStored>(value[r] * scale[r] - offset[r]);
  } else {
    for (std::size_t r = 0; r < count; ++r) scaled[r] = target[r] / scale[r];
    nearest_values<kTable>(b, scaled, value, count);
    for (std::size_t r = 0; r < count; ++r) error[r] = weight[r] - stored<kStored>(value[r] * scale[r]);
  }
}

// target += factor * error
inline void add_column(float factor, const float* __restrict error, float* __restrict target, std::size_t count) {
  for (std::size_t r = 0; r < count; ++r) target[r] += factor * error[r];
}

// The same with the errors of the columns [begin, begin + kTogether), the last one first.
inline void add_columns(const RoundBlock& b, std::size_t begin, std::size_t to, std::size_t first,
                        float* __restrict target, std::size_t count) {
  const float* __restrict errors = b.errors + begin * b.rows + first;
  const float* factors = b.lower + begin * b.lower_stride + to;
  float f[kTogether];
  for (std::size_t e = 0; e < kTogether; ++e) f[e] = factors[e * b.lower_stride];
  for (std::size_t r = 0; r < count; ++r) {
    float sum = target[r];
    for (std::size_t e = kTogether; e-- > 0;) sum += f[e] * errors[e * b.rows + r];
    target[r] = sum;
  }
}

template <Stored kStored, bool kTable>
inline void round_rows(const RoundBlock& b, Strip targets, std::size_t first, std::size_t count) {
  std::size_t end = b.columns;
  while (end > 0) {
    const std::size_t begin = end > kTogether ? end - kTogether : 0;
    for (std::size_t column = end; column-- > begin;) {
      round_column<kStored, kTable>(b, targets.at + column * targets.stride, column, first, count);
      const float* error = b.errors + column * b.rows + first;
      for (std::size_t before = begin; before < column; ++before) {
        add_column(b.lower[column * b.lower_stride + before], error, targets.at + before * targets.stride, count);
      }
    }
    for (std::size_t before = 0; before < begin; ++before) {
      add_columns(b, begin, before, first, targets.at + before * targets.stride, count);
    }
    end = begin;
  }
}

template <Stored kStored, bool kTable>
void round_all(const RoundBlock& b) {
  float near[kColumns * kRows];
  std::size_t first = 0;
  // A constant count lets the compiler unroll; what is left over takes the same path with its own.
  for (; b.columns <= kColumns && first + kRows <= b.rows; first += kRows) {
    for (std::size_t column = 0; column < b.columns; ++column) {
      __builtin_memcpy(near + column * kRows, b.targets + column * b.rows + first, kRows * sizeof(float));
    }
    round_rows<kStored, kTable>(b, {near, kRows}, first, kRows);
    for (std::size_t column = 0; column < b.columns; ++column) {
      __builtin_memcpy(b.targets + column * b.rows + first, near + column * kRows, kRows * sizeof(float));
    }
  }
  for (; first < b.rows; first += kRows) {
    const std::size_t count = b.rows - first < kRows ? b.rows - first : kRows;
    round_rows<kStored, kTable>(b, {b.targets + first, b.rows}, first, count);
  }
}

template <bool kTable>
void round_stored(const RoundBlock& b) {
  if (b.stored == Stored::kBFloat16) return round_all<Stored::kBFloat16, kTable>(b);
  if (b.stored == Stored::kFloat16) return round_all<Stored::kFloat16, kTable>(b);
  return round_all<Stored::kFloat32, kTable>(b);
}

void round_block(const RoundBlock& b) {
  return b.element.values == nullptr ? round_stored<false>(b) : round_stored<true>(b);
}

}  // namespace
}  // namespace pennyweight
