// Numbers of kLanes groups side by side. The compiler makes of each operation as many vectors as it needs, so every
// instruction set computes the same bits.
#pragma once

#include "rounding.h"

namespace pennyweight {
namespace {

constexpr std::size_t kGroups = kGroupsAtOnce;

typedef float Lanes __attribute__((vector_size(sizeof(float) * kGroups)));
typedef std::int32_t Mask __attribute__((vector_size(sizeof(std::int32_t) * kGroups)));

inline Lanes lanes(float x) { return x - Lanes{}; }

// By loops: of a comparison of vectors the compiler makes two instructions.
inline Lanes min_of(Lanes a, Lanes b) {
  for (std::size_t l = 0; l < kGroups; ++l) a[l] = a[l] < b[l] ? a[l] : b[l];
  return a;
}

inline Lanes max_of(Lanes a, Lanes b) {
  for (std::size_t l = 0; l < kGroups; ++l) a[l] = a[l] > b[l] ? a[l] : b[l];
  return a;
}

inline Lanes bounded(Lanes x, float low, float high) { return min_of(max_of(x, lanes(low)), lanes(high)); }
inline Lanes magnitude(Lanes x) { return max_of(x, -x); }

// Whole numbers from `low` to `high`, both below 2^22 in magnitude.
struct Whole {
  Mask low;
  Mask high;
};

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits left for a fraction

inline Whole whole(float low, float high) {
  return {static_cast<std::int32_t>(bits_of(kMagic + low)) - Mask{},
          static_cast<std::int32_t>(bits_of(kMagic + high)) - Mask{}};
}

// The nearest whole number of the range, ties to even. The bits of floats of one sign rise like the floats, and all of
// those below zero are below those above it, so any sum with kMagic is bounded by its bits.
inline Lanes nearest(Lanes x, const Whole& range) {
  Mask bits = (Mask)(x + lanes(kMagic));
  bits = bits > range.low ? bits : range.low;
  bits = bits < range.high ? bits : range.high;
  return (Lanes)bits - lanes(kMagic);
}

inline Lanes to_stored(Lanes x, Stored kind) {
  if (kind == Stored::kFloat32) return x;
  for (std::size_t l = 0; l < kGroups; ++l) x[l] = kind == Stored::kFloat16 ? to_float16(x[l]) : to_bfloat16(x[l]);
  return x;
}

// Lane l of the result is lane l ^ kHalf.
template <int kHalf>
inline Lanes swapped(Lanes x) {
  constexpr int h = kHalf;
  return Lanes{x[0 ^ h], x[1 ^ h], x[2 ^ h],  x[3 ^ h],  x[4 ^ h],  x[5 ^ h],  x[6 ^ h],  x[7 ^ h],
               x[8 ^ h], x[9 ^ h], x[10 ^ h], x[11 ^ h], x[12 ^ h], x[13 ^ h], x[14 ^ h], x[15 ^ h]};
}

// In every lane the sum over its run of `span` lanes, a power of two.
inline Lanes sum_of_span(Lanes x, std::size_t span) {
  if (span > 1) x += swapped<1>(x);
  if (span > 2) x += swapped<2>(x);
  if (span > 4) x += swapped<4>(x);
  if (span > 8) x += swapped<8>(x);
  return x;
}

inline Lanes max_of_span(Lanes x, std::size_t span) {
  if (span > 1) x = max_of(x, swapped<1>(x));
  if (span > 2) x = max_of(x, swapped<2>(x));
  if (span > 4) x = max_of(x, swapped<4>(x));
  if (span > 8) x = max_of(x, swapped<8>(x));
  return x;
}

inline bool any(Mask mask) {
  std::int32_t found = 0;
  for (std::size_t l = 0; l < kGroups; ++l) found |= mask[l];
  return found != 0;
}

}  // namespace
}  // namespace pennyweight
