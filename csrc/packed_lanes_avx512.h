// Sixteen rows at a time; without VNNI a product of bytes takes three instructions.
#pragma once

#include <immintrin.h>

#include "packed_multiply.h"

namespace pennyweight {
namespace {

struct Lanes512 {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr bool kHasPlanes = true;
  static constexpr int kRows = 16;
  static constexpr int kTiles = 2;
  static constexpr int kLargestBlock = 8;
  // Totals stay in registers beside the sums of a group.
  static constexpr int kOneOfSeveral = 6;
#if defined(__AVX512VNNI__)
  static constexpr bool kOnlyWide = true;
#else
  static constexpr bool kOnlyWide = false;
#endif

  // On AMD's processors the logic of vectors has units of its own, beside those that multiply.
  static std::size_t direct_blocks(bool is_one_plane) {
    if (!__builtin_cpu_is("amd")) return 4;
    return is_one_plane ? kMostTokens : 16;
  }

  static PENNYWEIGHT_INLINE Bytes load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static PENNYWEIGHT_INLINE void store(std::uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
  static PENNYWEIGHT_INLINE Bytes mix(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }

  template <int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes moved(Bytes x) {
    if constexpr (kFrom > kTo) return _mm512_srli_epi16(x, kFrom - kTo);
    if constexpr (kFrom < kTo) return _mm512_slli_epi16(x, kTo - kFrom);
    return x;
  }
  template <int kBits, int kTo>
  static PENNYWEIGHT_INLINE Bytes mask() {
    return _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << kTo));
  }
  // Bits [kFrom, kFrom + kBits) of each byte, at kTo.
  template <int kBits, int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes field(Bytes x) {
    return _mm512_and_si512(moved<kFrom, kTo>(x), mask<kBits, kTo>());
  }
  template <int kBits, int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes merge(Bytes low, Bytes x) {
    // In brackets: without optimization this is a macro.
    return _mm512_ternarylogic_epi32((moved<kFrom, kTo>(x)), (mask<kBits, kTo>()), low, 0xEA);  // (a & b) | c
  }
  static PENNYWEIGHT_INLINE Bytes look_up(const std::uint8_t* table, Bytes codes) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
  }
  static PENNYWEIGHT_INLINE Bytes spread(std::int32_t word) { return _mm512_set1_epi32(word); }

  template <bool kWide>
  static PENNYWEIGHT_INLINE Ints dot(Ints sum, Bytes codes, Bytes word) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, codes, word);
#else
    const __m512i ones = _mm512_set1_epi16(1);
    if constexpr (kWide) {
      // Products of two codes above 63 do not fit into 16 bits together.
      const __m512i even = _mm512_maddubs_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x00ff)), word);
      const __m512i odd = _mm512_maddubs_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x00ff), codes), word);
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, ones));
      return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, ones));
    } else {
      return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, word), ones));
    }
#endif
  }

  static PENNYWEIGHT_INLINE Ints ints(std::int32_t x) { return _mm512_set1_epi32(x); }
  static PENNYWEIGHT_INLINE Ints times(Ints a, std::int32_t x) { return _mm512_mullo_epi32(a, ints(x)); }
  static PENNYWEIGHT_INLINE Ints load_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static PENNYWEIGHT_INLINE Floats floats(float x) { return _mm512_set1_ps(x); }
  static PENNYWEIGHT_INLINE Floats floats_of(Ints x) { return _mm512_cvtepi32_ps(x); }
  static PENNYWEIGHT_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static PENNYWEIGHT_INLINE Floats load_floats(const std::uint8_t* p, FloatKind kind) {
    if (kind == FloatKind::kFloat32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (kind == FloatKind::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static PENNYWEIGHT_INLINE void store_floats(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  static PENNYWEIGHT_INLINE Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static PENNYWEIGHT_INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
};

}  // namespace
}  // namespace pennyweight
