// The bodies of Kernels::range_groups, encode_groups and pack_nibbles, compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "rounding.h"

namespace pennyweight {
namespace {

inline float number(float x) { return x; }
inline float number(std::uint16_t bfloat16) { return float_of(static_cast<std::uint32_t>(bfloat16) << 16); }

// Smallest and largest of a group in kWide lanes, folded in halves. A group may be shorter than the lanes.
template <typename Stored>
void range_of(const Stored* w, std::size_t groups, std::size_t size, float* low, float* high) {
  constexpr std::size_t kWide = 32;
  for (std::size_t i = 0; i < groups; ++i, w += size) {
    float least[kWide], most[kWide];
    for (std::size_t l = 0; l < kWide; ++l) least[l] = most[l] = number(w[size < kWide ? 0 : l]);
    std::size_t k = size < kWide ? 0 : kWide;
    for (; k + kWide <= size; k += kWide) {
      for (std::size_t l = 0; l < kWide; ++l) {
        const float x = number(w[k + l]);
        least[l] = min_of(x, least[l]);
        most[l] = max_of(x, most[l]);
      }
    }
    for (; k < size; ++k) {
      least[0] = min_of(number(w[k]), least[0]);
      most[0] = max_of(number(w[k]), most[0]);
    }
    for (std::size_t half = kWide / 2; half > 0; half /= 2) {
      for (std::size_t l = 0; l < half; ++l) {
        least[l] = min_of(least[l + half], least[l]);
        most[l] = max_of(most[l + half], most[l]);
      }
    }
    low[i] = least[0];
    high[i] = most[0];
  }
}

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
