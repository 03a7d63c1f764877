// Four rows at a time.
#pragma once

#include <arm_neon.h>

#include "packed_multiply.h"

namespace pennyweight {
namespace {

struct LanesNeon {
  using Bytes = uint8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  static constexpr bool kHasPlanes = true;
  static constexpr int kRows = 4;
  static constexpr int kTiles = 1;
  static constexpr int kLargestBlock = 4;
  static constexpr int kOneOfSeveral = 4;
  static constexpr bool kOnlyWide = false;

  static std::size_t direct_blocks(bool) { return 4; }

  static PENNYWEIGHT_INLINE Bytes load(const std::uint8_t* p) { return vld1q_u8(p); }
  static PENNYWEIGHT_INLINE void store(std::uint8_t* p, Bytes x) { vst1q_u8(p, x); }
  static PENNYWEIGHT_INLINE Bytes mix(Bytes a, Bytes b) { return veorq_u8(a, b); }

  template <int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes moved(Bytes x) {
    if constexpr (kFrom > kTo) return vshrq_n_u8(x, kFrom - kTo);
    if constexpr (kFrom < kTo) return vshlq_n_u8(x, kTo - kFrom);
    return x;
  }
  // Bits [kFrom, kFrom + kBits) of each byte, at kTo.
  template <int kBits, int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes field(Bytes x) {
    return vandq_u8(moved<kFrom, kTo>(x), vdupq_n_u8(((1 << kBits) - 1) << kTo));
  }
  template <int kBits, int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes merge(Bytes low, Bytes x) {
    return vorrq_u8(low, field<kBits, kFrom, kTo>(x));
  }
  static PENNYWEIGHT_INLINE Bytes look_up(const std::uint8_t* table, Bytes codes) {
    return vqtbl1q_u8(vld1q_u8(table), codes);
  }
  static PENNYWEIGHT_INLINE Bytes spread(std::int32_t word) { return vreinterpretq_u8_s32(vdupq_n_s32(word)); }

  template <bool kWide>
  static PENNYWEIGHT_INLINE Ints dot(Ints sum, Bytes codes, Bytes word) {
    const int8x16_t bytes = vreinterpretq_s8_u8(word);
    if constexpr (kWide) {
      // Both factors have signs: codes less 128 go in, and 128 times the word, the same for all rows, is made up for.
      const Ints missing = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), bytes);
      codes = veorq_u8(codes, vdupq_n_u8(0x80));
      return vsubq_s32(vdotq_s32(sum, vreinterpretq_s8_u8(codes), bytes), missing);
    } else {
      return vdotq_s32(sum, vreinterpretq_s8_u8(codes), bytes);
    }
  }

  static PENNYWEIGHT_INLINE Ints ints(std::int32_t x) { return vdupq_n_s32(x); }
  static PENNYWEIGHT_INLINE Ints times(Ints a, std::int32_t x) { return vmulq_n_s32(a, x); }
  static PENNYWEIGHT_INLINE Ints load_bytes(const std::uint8_t* p) {
    std::uint32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word)))));
  }
  static PENNYWEIGHT_INLINE Floats floats(float x) { return vdupq_n_f32(x); }
  static PENNYWEIGHT_INLINE Floats floats_of(Ints x) { return vcvtq_f32_s32(x); }
  static PENNYWEIGHT_INLINE Floats load_floats(const float* p) { return vld1q_f32(p); }
  static PENNYWEIGHT_INLINE Floats load_floats(const std::uint8_t* p, FloatKind kind) {
    if (kind == FloatKind::kFloat32) return vreinterpretq_f32_u8(vld1q_u8(p));
    const uint8x8_t half = vld1_u8(p);
    if (kind == FloatKind::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u8(half));
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(half), 16));
  }
  static PENNYWEIGHT_INLINE void store_floats(float* p, Floats x) { vst1q_f32(p, x); }
  static PENNYWEIGHT_INLINE Floats product(Floats a, Floats b) { return vmulq_f32(a, b); }
  static PENNYWEIGHT_INLINE Floats add_product(Floats sum, Floats a, Floats b) { return vfmaq_f32(sum, a, b); }
};

}  // namespace
}  // namespace pennyweight
