// The bodies of Kernels::range_groups, encode_groups and pack_nibbles, compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "ranges.h"
#include "rounding.h"

namespace pennyweight {
namespace {

void range_groups(const void* w, bool is_bfloat16, std::size_t groups, std::size_t size, float* low, float* high) {
  if (is_bfloat16) return range_of(static_cast<const std::uint16_t*>(w), groups, size, low, high);
  return range_of(static_cast<const float*>(w), groups, size, low, high);
}

// `count` codes of one group; a constant count lets the compiler keep all of them in vectors.
template <typename Stored>
inline void encode_run(const Stored* __restrict w, std::uint8_t* __restrict codes, std::size_t count, float scale,
                       float zero, float smallest, float largest) {
  for (std::size_t k = 0; k < count; ++k) {
    const float value = round_even(min_of(max_of(number(w[k]) / scale + zero, smallest), largest));
    codes[k] = static_cast<std::uint8_t>(static_cast<std::int32_t>(value - smallest));
  }
}

template <typename Stored>
void encode_all(const EncodeGroups& e) {
  constexpr std::size_t kWide = 64;
  const Stored* w = static_cast<const Stored*>(e.w);
  std::uint8_t* codes = e.codes;
  const std::size_t size = e.size;
  const float smallest = e.smallest, largest = e.largest;
  for (std::size_t i = 0; i < e.groups; ++i, w += size, codes += size) {
    const float scale = e.scales[i];
    const float zero = e.zeros == nullptr ? 0.0f : e.zeros[i];
    std::size_t k = 0;
    for (; k + kWide <= size; k += kWide) encode_run(w + k, codes + k, kWide, scale, zero, smallest, largest);
    encode_run(w + k, codes + k, size - k, scale, zero, smallest, largest);
  }
}

void encode_groups(const EncodeGroups& e) {
  if (e.is_bfloat16) return encode_all<std::uint16_t>(e);
  return encode_all<float>(e);
}

void pack_nibbles(const std::uint8_t* codes, std::size_t bytes, std::uint8_t* packed) {
  for (std::size_t i = 0; i < bytes; ++i) {
    std::uint16_t pair;
    __builtin_memcpy(&pair, codes + 2 * i, sizeof pair);
    packed[i] = static_cast<std::uint8_t>(pair | pair >> 4);
  }
}

}  // namespace
}  // namespace pennyweight
