// Sixteen rows at a time as plain loops, for any processor.
#pragma once

#include "packed_multiply.h"

namespace pennyweight {
namespace {

struct PlainLanes {
  struct Bytes {
    std::uint8_t at[64];
  };
  struct Ints {
    std::int32_t at[16];
  };
  struct Floats {
    float at[16];
  };
  static constexpr bool kHasPlanes = false;
  static constexpr int kRows = 16;
  static constexpr int kTiles = 1;
  static constexpr int kLargestBlock = 4;
  static constexpr int kOneOfSeveral = 4;
  static constexpr bool kOnlyWide = true;

  static inline Bytes load(const std::uint8_t* p) {
    Bytes x;
    __builtin_memcpy(x.at, p, sizeof x.at);
    return x;
  }
  static inline void store(std::uint8_t* p, const Bytes& x) { __builtin_memcpy(p, x.at, sizeof x.at); }
  static inline Bytes mix(Bytes a, const Bytes& b) {
    for (int i = 0; i < 64; ++i) a.at[i] = static_cast<std::uint8_t>(a.at[i] ^ b.at[i]);
    return a;
  }
  // Bits [kFrom, kFrom + kBits) of each byte, at kTo.
  template <int kBits, int kFrom, int kTo>
  static inline Bytes field(Bytes x) {
    for (int i = 0; i < 64; ++i) x.at[i] = static_cast<std::uint8_t>(((x.at[i] >> kFrom) & ((1 << kBits) - 1)) << kTo);
    return x;
  }
  template <int kBits, int kFrom, int kTo>
  static inline Bytes merge(Bytes low, const Bytes& x) {
    const Bytes high = field<kBits, kFrom, kTo>(x);
    for (int i = 0; i < 64; ++i) low.at[i] = static_cast<std::uint8_t>(low.at[i] | high.at[i]);
    return low;
  }
  static inline Bytes look_up(const std::uint8_t* table, Bytes codes) {
    for (int i = 0; i < 64; ++i) codes.at[i] = table[codes.at[i] & 15];
    return codes;
  }
  static inline Bytes spread(std::int32_t word) {
    Bytes x;
    for (int i = 0; i < 16; ++i) __builtin_memcpy(x.at + 4 * i, &word, 4);
    return x;
  }
  template <bool>
  static inline Ints dot(Ints sum, const Bytes& codes, const Bytes& word) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) sum.at[i] += codes.at[4 * i + j] * static_cast<std::int8_t>(word.at[4 * i + j]);
    }
    return sum;
  }
  static inline Ints ints(std::int32_t x) {
    Ints y;
    for (int i = 0; i < 16; ++i) y.at[i] = x;
    return y;
  }
  static inline Ints times(Ints a, std::int32_t x) {
    for (int i = 0; i < 16; ++i) a.at[i] *= x;
    return a;
  }
  static inline Ints load_bytes(const std::uint8_t* p) {
    Ints y;
    for (int i = 0; i < 16; ++i) y.at[i] = p[i];
    return y;
  }
  static inline Floats floats(float x) {
    Floats y;
    for (int i = 0; i < 16; ++i) y.at[i] = x;
    return y;
  }
  static inline Floats floats_of(const Ints& x) {
    Floats y;
    for (int i = 0; i < 16; ++i) y.at[i] = static_cast<float>(x.at[i]);
    return y;
  }
  static inline Floats load_floats(const float* p) {
    Floats y;
    __builtin_memcpy(y.at, p, sizeof y.at);
    return y;
  }
  static inline Floats load_floats(const std::uint8_t* p, FloatKind kind) {
    if (kind == FloatKind::kFloat32) return load_floats(reinterpret_cast<const float*>(p));
    Floats y;
    for (int i = 0; i < 16; ++i) {
      std::uint16_t bits;
      __builtin_memcpy(&bits, p + 2 * i, 2);
      y.at[i] = widened(bits, kind);
    }
    return y;
  }
  static inline void store_floats(float* p, const Floats& x) { __builtin_memcpy(p, x.at, sizeof x.at); }
  static inline Floats product(Floats a, const Floats& b) {
    for (int i = 0; i < 16; ++i) a.at[i] *= b.at[i];
    return a;
  }
  static inline Floats add_product(Floats sum, const Floats& a, const Floats& b) {
    for (int i = 0; i < 16; ++i) sum.at[i] += a.at[i] * b.at[i];
    return sum;
  }
};

}  // namespace

}  // namespace pennyweight
