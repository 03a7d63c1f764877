// The bodies of Kernels::range_groups and Kernels::encode_groups, compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "rounding.h"

namespace pennyweight {
namespace {

void range_groups(const float* w, std::size_t groups, std::size_t size, float* low, float* high) {
  constexpr std::size_t kWide = 16;
  for (std::size_t i = 0; i < groups; ++i, w += size) {
    float least[kWide], most[kWide];
    for (std::size_t l = 0; l < kWide; ++l) least[l] = most[l] = w[0];
    std::size_t k = 0;
    for (; k + kWide <= size; k += kWide) {
      for (std::size_t l = 0; l < kWide; ++l) {
        least[l] = min_of(w[k + l], least[l]);
        most[l] = max_of(w[k + l], most[l]);
      }
    }
    for (; k < size; ++k) {
      least[0] = min_of(w[k], least[0]);
      most[0] = max_of(w[k], most[0]);
    }
    for (std::size_t l = 1; l < kWide; ++l) {
      least[0] = min_of(least[l], least[0]);
      most[0] = max_of(most[l], most[0]);
    }
    low[i] = least[0];
    high[i] = most[0];
  }
}

void encode_groups(const EncodeGroups& e) {
  for (std::size_t i = 0; i < e.groups; ++i) {
    const float* __restrict w = e.w + i * e.size;
    std::uint8_t* __restrict codes = e.codes + i * e.size;
    const float scale = e.scales[i];
    const float zero = e.zeros == nullptr ? 0.0f : e.zeros[i];
    for (std::size_t k = 0; k < e.size; ++k) {
      const float value = round_even(min_of(max_of(w[k] / scale + zero, e.smallest), e.largest));
      codes[k] = static_cast<std::uint8_t>(static_cast<int>(value - e.smallest));
    }
  }
}

}  // namespace
}  // namespace pennyweight
