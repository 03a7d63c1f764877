// Activations rounded to bytes, compiled once for each instruction set.
#pragma once

#include "lanes.h"
#include "packed.h"

namespace pennyweight {
namespace {

inline float widened(std::uint16_t bits, FloatKind kind) {
  if (kind == FloatKind::kBFloat16) return float_of(static_cast<std::uint32_t>(bits) << 16);
  // float16: the exponent moves by a multiplication, which makes subnormal numbers right too.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const float value = float_of(magnitude) * float_of(0x77800000u);  // 2^112
  return float_of(bits_of(value) | special | static_cast<std::uint32_t>(bits & 0x8000u) << 16);
}

inline std::uint16_t narrowed(float x, FloatKind kind) {
  if (x != x) return kind == FloatKind::kBFloat16 ? 0x7fc0u : 0x7e00u;
  if (kind == FloatKind::kBFloat16) return static_cast<std::uint16_t>(bits_of(to_bfloat16(x)) >> 16);
  const float y = to_float16(x);
  const std::uint32_t sign = (bits_of(y) >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits_of(y) & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  const std::uint32_t scaled = bits_of(float_of(magnitude) * float_of(0x07800000u));  // 2^-112
  return static_cast<std::uint16_t>(sign | (scaled >> 13));
}

// Groups whose numbers are all this small count as zeros: their scales would have no inverse.
constexpr float kSmallestScale = 1e-30f;

typedef std::int8_t ByteLanes __attribute__((vector_size(kGroups)));

inline Lanes lanes_at(const float* x) {
  Lanes y;
  __builtin_memcpy(&y, x, sizeof y);
  return y;
}

template <int kHalf>
inline Mask swapped_whole(Mask x) {
  return (Mask)swapped<kHalf>((Lanes)x);
}

inline Mask max_of(Mask a, Mask b) { return a > b ? a : b; }

inline std::uint32_t largest_magnitude(const float* x, std::size_t count) {
  Mask most = {};
  for (std::size_t k = 0; k < count; k += kGroups) {
    most = max_of(most, (Mask)lanes_at(x + k) & 0x7fffffff);
  }
  most = max_of(most, swapped_whole<8>(most));
  most = max_of(most, swapped_whole<4>(most));
  most = max_of(most, swapped_whole<2>(most));
  most = max_of(most, swapped_whole<1>(most));
  return static_cast<std::uint32_t>(most[0]);
}

// `left` [group] rounded to bytes with this scale; what they do not hold stays in it.
inline std::int32_t round_plane(float* left, std::size_t group, float scale, std::int8_t* bytes) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  const std::int32_t magic = static_cast<std::int32_t>(bits_of(kMagic));
  Mask sums = {};
  for (std::size_t k = 0; k < group; k += kGroups) {
    const Lanes numbers = lanes_at(left + k);
    const Lanes moved = numbers * lanes(inverse) + lanes(kMagic);
    const Mask values = (Mask)moved - magic;
    const ByteLanes narrow = __builtin_convertvector(values, ByteLanes);
    const Lanes rest = numbers - (moved - lanes(kMagic)) * lanes(scale);
    __builtin_memcpy(bytes + k, &narrow, sizeof narrow);
    __builtin_memcpy(left + k, &rest, sizeof rest);
    sums += values;
  }
  sums += swapped_whole<8>(sums);
  sums += swapped_whole<4>(sums);
  sums += swapped_whole<2>(sums);
  sums += swapped_whole<1>(sums);
  return sums[0];
}

inline void read_group(const RoundTokens& tokens, std::size_t row, std::size_t begin, std::size_t count, float* out) {
  const std::size_t at = row * tokens.cols + begin;
  if (tokens.kind == FloatKind::kFloat32) {
    const float* x = static_cast<const float*>(tokens.x) + at;
    for (std::size_t k = 0; k < count; ++k) out[k] = x[k];
  } else if (tokens.kind == FloatKind::kBFloat16) {
    const std::uint16_t* x = static_cast<const std::uint16_t*>(tokens.x) + at;
    for (std::size_t k = 0; k < count; ++k) out[k] = widened(x[k], FloatKind::kBFloat16);
  } else {
    const std::uint16_t* x = static_cast<const std::uint16_t*>(tokens.x) + at;
    for (std::size_t k = 0; k < count; ++k) out[k] = widened(x[k], FloatKind::kFloat16);
  }
}

inline void round_tokens(const RoundTokens& tokens) {
  const std::size_t group = tokens.group;
  const std::size_t groups = (tokens.cols + group - 1) / group;
  const RoundedTokens& out = tokens.out;
  float numbers[kLargestGroup];
  std::int8_t bytes[kLargestGroup];
  for (std::size_t row = tokens.row_begin; row < tokens.row_end; ++row) {
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t count = g + 1 == groups ? tokens.cols - g * group : group;
      read_group(tokens, row, g * group, count, numbers);
      for (std::size_t k = count; k < group; ++k) numbers[k] = 0.0f;
      const std::uint32_t most = largest_magnitude(numbers, group);
      const bool is_finite = most < 0x7f800000u;
      float scale = is_finite ? float_of(most) / 127.0f : 0.0f;
      if (scale < kSmallestScale) scale = 0.0f;
      if (!is_finite) {
        for (std::size_t k = 0; k < group; ++k) numbers[k] = 0.0f;
      }
      for (std::size_t plane = 0; plane < out.planes; ++plane, scale /= 254.0f) {
        const std::size_t token = row * out.planes + plane;
        const std::size_t at = token / out.block * groups + g;
        const std::size_t lane = token % out.block;
        out.sums[at * out.block + lane] = round_plane(numbers, group, scale, bytes);
        out.scales[at * out.block + lane] = is_finite ? scale : float_of(0x7fc00000u);
        std::int32_t* words = out.words + at * (group / 4) * out.block;
        if (out.is_matrix) {
          __builtin_memcpy(words + lane * (group / 4), bytes, group);
          continue;
        }
        for (std::size_t quad = 0; quad < group / 4; ++quad) {
          __builtin_memcpy(words + quad * out.block + lane, bytes + 4 * quad, 4);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pennyweight
