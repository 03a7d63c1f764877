// Eight rows at a time; without VNNI a product of bytes takes three instructions.
#pragma once

#include <immintrin.h>

#include "packed_multiply.h"

namespace pennyweight {
namespace {

struct Lanes256 {
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr bool kHasPlanes = true;
  static constexpr int kRows = 8;
  static constexpr int kTiles = 1;
  static constexpr int kLargestBlock = 4;
  static constexpr int kOneOfSeveral = 4;
#if defined(__AVXVNNI__)
  static constexpr bool kOnlyWide = true;
#else
  static constexpr bool kOnlyWide = false;
#endif

  static std::size_t direct_blocks(bool is_one_plane) { return is_one_plane ? 8 : 4; }

  static PENNYWEIGHT_INLINE Bytes load(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static PENNYWEIGHT_INLINE void store(std::uint8_t* p, Bytes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  static PENNYWEIGHT_INLINE Bytes mix(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }

  template <int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes moved(Bytes x) {
    if constexpr (kFrom > kTo) return _mm256_srli_epi16(x, kFrom - kTo);
    if constexpr (kFrom < kTo) return _mm256_slli_epi16(x, kTo - kFrom);
    return x;
  }
  // Bits [kFrom, kFrom + kBits) of each byte, at kTo.
  template <int kBits, int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes field(Bytes x) {
    return _mm256_and_si256(moved<kFrom, kTo>(x), _mm256_set1_epi8(static_cast<char>(((1 << kBits) - 1) << kTo)));
  }
  template <int kBits, int kFrom, int kTo>
  static PENNYWEIGHT_INLINE Bytes merge(Bytes low, Bytes x) {
    return _mm256_or_si256(low, field<kBits, kFrom, kTo>(x));
  }
  static PENNYWEIGHT_INLINE Bytes look_up(const std::uint8_t* table, Bytes codes) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
  }
  static PENNYWEIGHT_INLINE Bytes spread(std::int32_t word) { return _mm256_set1_epi32(word); }

  template <bool kWide>
  static PENNYWEIGHT_INLINE Ints dot(Ints sum, Bytes codes, Bytes word) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, word);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (kWide) {
      // Products of two codes above 63 do not fit into 16 bits together.
      const __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x00ff)), word);
      const __m256i odd = _mm256_maddubs_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x00ff), codes), word);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, ones));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, ones));
    } else {
      return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, word), ones));
    }
#endif
  }

  static PENNYWEIGHT_INLINE Ints ints(std::int32_t x) { return _mm256_set1_epi32(x); }
  static PENNYWEIGHT_INLINE Ints times(Ints a, std::int32_t x) { return _mm256_mullo_epi32(a, ints(x)); }
  static PENNYWEIGHT_INLINE Ints load_bytes(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static PENNYWEIGHT_INLINE Floats floats(float x) { return _mm256_set1_ps(x); }
  static PENNYWEIGHT_INLINE Floats floats_of(Ints x) { return _mm256_cvtepi32_ps(x); }
  static PENNYWEIGHT_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static PENNYWEIGHT_INLINE Floats load_floats(const std::uint8_t* p, FloatKind kind) {
    if (kind == FloatKind::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (kind == FloatKind::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static PENNYWEIGHT_INLINE void store_floats(float* p, Floats x) { _mm256_storeu_ps(p, x); }
  static PENNYWEIGHT_INLINE Floats product(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static PENNYWEIGHT_INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
};

}  // namespace
}  // namespace pennyweight
