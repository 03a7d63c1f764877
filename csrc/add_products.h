// The bodies of Kernels::pair_rows and Kernels::add_products, for processors that multiply bfloat16.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace pennyweight {
namespace {

constexpr std::size_t kPanel = kPanelColumns;
// Pairs of rows per pass: a panel of them, 32 KiB, stays in the first-level cache.
constexpr std::size_t kPairs = 128;
constexpr std::size_t kVectors = kPanel / 16;
// Rows of a tile that are summed together: 4 x 4 sums hide the latency of one.
constexpr std::size_t kRowsOfTile = 4;

inline __m512bh pairs_of(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

// total[r, c] += sum over pairs of a[pair, r] . b[pair, c], for kRowsOfTile rows and kPanel columns.
inline void add_tile(const std::uint32_t* a, const std::uint32_t* b, std::size_t pairs, float* total,
                     std::size_t stride) {
  __m512 sums[kRowsOfTile][kVectors];
  for (std::size_t r = 0; r < kRowsOfTile; ++r) {
    for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (std::size_t k = 0; k < pairs; ++k, a += kPanel, b += kPanel) {
    __m512bh right[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) right[v] = pairs_of(_mm512_loadu_si512(b + 16 * v));
    for (std::size_t r = 0; r < kRowsOfTile; ++r) {
      const __m512bh left = pairs_of(_mm512_set1_epi32(static_cast<int>(a[r])));
      for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
  for (std::size_t r = 0; r < kRowsOfTile; ++r) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      float* at = total + r * stride + 16 * v;
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[r][v]));
    }
  }
}

void add_products(const AddProducts& p) {
  for (std::size_t first = 0; first < p.pairs; first += kPairs) {
    const std::size_t pairs = p.pairs - first < kPairs ? p.pairs - first : kPairs;
    for (std::size_t j = p.right_begin; j < p.right_end; ++j) {
      const std::uint32_t* right = p.panels + (j * p.pairs + first) * kPanel;
      const std::size_t end = p.left_end < j + 1 ? p.left_end : j + 1;
      for (std::size_t i = p.left_begin; i < end; ++i) {
        const std::uint32_t* left = p.panels + (i * p.pairs + first) * kPanel;
        for (std::size_t r = 0; r < kPanel; r += kRowsOfTile) {
          add_tile(left + r, right, pairs, p.total + (i * kPanel + r) * p.columns + j * kPanel, p.columns);
        }
      }
    }
  }
}

void pair_rows(const std::uint16_t* x, std::size_t rows, std::size_t columns, std::size_t panel, std::uint32_t* out) {
  const std::uint16_t* at = x + panel * kPanel;
  for (std::size_t row = 0; row < rows; row += 2, out += kPanel) {
    const std::uint16_t* __restrict first = at + row * columns;
    const std::uint16_t* __restrict second = first + columns;
    if (row + 1 < rows) {
      for (std::size_t c = 0; c < kPanel; ++c) {
        out[c] = static_cast<std::uint32_t>(first[c]) | static_cast<std::uint32_t>(second[c]) << 16;
      }
    } else {
      for (std::size_t c = 0; c < kPanel; ++c) out[c] = first[c];
    }
  }
}

}  // namespace
}  // namespace pennyweight
