// Rounding, for the kernels that are compiled once for each instruction set. Products and sums are rounded separately
// (-ffp-contract=off), so every instruction set gives the same bits.
// No standard header with inline functions may be included here: its copies for one instruction set could be linked
// into code for another.
#pragma once

#include "kernels.h"

namespace pennyweight {
namespace {

inline float min_of(float a, float b) { return a < b ? a : b; }
inline float max_of(float a, float b) { return a > b ? a : b; }

// Nearest whole number, ties to even, for |x| < 2^22.
inline float round_even(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum has no bits left for a fraction
  return (x + kMagic) - kMagic;
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_bfloat16(float x) {
  const std::uint32_t bits = bits_of(x);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

inline float to_float16(float x) {
  const std::uint32_t bits = bits_of(x);
  const float normal = float_of((bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u);
  const float tiny = (x + 0.75f) - 0.75f;  // below 2^-14 float16 has multiples of 2^-24 only
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const float finite = magnitude < 0x38800000u ? tiny : normal;
  const float infinite = float_of((bits & 0x80000000u) | 0x7f800000u);
  return magnitude >= 0x477ff000u ? infinite : finite;  // 65520 and more
}

template <Stored kStored>
inline float stored(float x) {
  if constexpr (kStored == Stored::kBFloat16) return to_bfloat16(x);
  if constexpr (kStored == Stored::kFloat16) return to_float16(x);
  return x;
}

}  // namespace
}  // namespace pennyweight
