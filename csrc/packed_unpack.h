// Packed codes as bytes, compiled once for each instruction set.
#pragma once

#include "packed.h"

#define PENNYWEIGHT_INLINE inline __attribute__((always_inline))
// Numbers of a loop that is unrolled stay in registers.
#define PENNYWEIGHT_UNROLL _Pragma("GCC unroll 16")

namespace pennyweight {
namespace {

// The bytes of quad q of a chunk of kQuads: codes of kBits bits, from one plane or two.
template <class L, int kBits, int kQuads, int q>
PENNYWEIGHT_INLINE typename L::Bytes quad_of(const std::uint8_t* chunk) {
  constexpr int kLow = kBits == 3 ? 2 : kBits == 5 || kBits == 6 ? 4 : kBits;
  constexpr int kPerLow = 8 / kLow;
  const typename L::Bytes low = L::load(chunk + 64 * (q / kPerLow));
  if constexpr (kLow == 8) {
    return low;
  } else {
    const typename L::Bytes fields = L::template field<kLow, q % kPerLow * kLow, 0>(low);
    if constexpr (kBits == kLow) {
      return fields;
    } else {
      constexpr int kHigh = kBits - kLow;
      constexpr int kPerHigh = 8 / kHigh;
      const typename L::Bytes high = L::load(chunk + 64 * (kQuads / kPerLow + q / kPerHigh));
      return L::template merge<kHigh, q % kPerHigh * kHigh, kLow>(fields, high);
    }
  }
}

// Codes of `chunks` chunks of a tile as bytes, or what a table has for them.
template <class L, int kBits, int kQuads, int q>
PENNYWEIGHT_INLINE void unpack_quads(const std::uint8_t* chunk, std::uint8_t* panel) {
  if constexpr (q < kQuads) {
    for (std::size_t half = 0; half < 64; half += sizeof(typename L::Bytes)) {
      L::store(panel + 64 * q + half, quad_of<L, kBits, kQuads, q>(chunk + half));
    }
    unpack_quads<L, kBits, kQuads, q + 1>(chunk, panel);
  }
}

template <class L, int kBits, int kQuads>
__attribute__((noinline)) void unpack_chunks(const std::uint8_t* codes, std::size_t chunks, std::uint8_t* panel) {
  for (std::size_t c = 0; c < chunks; ++c) {
    unpack_quads<L, kBits, kQuads, 0>(codes + c * 8 * kBits * kQuads, panel + c * 64 * kQuads);
  }
}

template <class L>
void unpack_groups(const PackedWeights& w, const std::uint8_t* codes, std::size_t groups, const std::uint8_t* table,
                   std::uint8_t* panel) {
  const bool is_even = w.group % 32 == 0;
  const std::size_t chunks = groups * w.group / (is_even ? 32 : 16);
  switch (w.bits) {
    case 2:
      is_even ? unpack_chunks<L, 2, 8>(codes, chunks, panel) : unpack_chunks<L, 2, 4>(codes, chunks, panel);
      break;
    case 3:
      unpack_chunks<L, 3, 8>(codes, chunks, panel);
      break;
    case 4:
      is_even ? unpack_chunks<L, 4, 8>(codes, chunks, panel) : unpack_chunks<L, 4, 4>(codes, chunks, panel);
      break;
    case 5:
      unpack_chunks<L, 5, 8>(codes, chunks, panel);
      break;
    case 6:
      is_even ? unpack_chunks<L, 6, 8>(codes, chunks, panel) : unpack_chunks<L, 6, 4>(codes, chunks, panel);
      break;
    default:
      is_even ? unpack_chunks<L, 8, 8>(codes, chunks, panel) : unpack_chunks<L, 8, 4>(codes, chunks, panel);
      break;
  }
  if (table == nullptr) return;
  const std::size_t count = groups * w.group * kTileRows;
  if (w.table_bits == 4) {
    for (std::size_t i = 0; i < count; i += sizeof(typename L::Bytes)) {
      L::store(panel + i, L::look_up(table, L::load(panel + i)));
    }
  } else {
    for (std::size_t i = 0; i < count; ++i) panel[i] = table[panel[i]];
  }
}

}  // namespace
}  // namespace pennyweight
