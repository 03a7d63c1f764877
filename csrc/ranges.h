// Smallest and largest weights, compiled once for each instruction set.
#pragma once

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

}  // namespace
}  // namespace pennyweight
