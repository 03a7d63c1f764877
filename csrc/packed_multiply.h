// Products with packed weights, compiled once for each instruction set. `L` has the operations on vectors of kRows
// numbers, or of four times as many bytes; without kHasPlanes all codes are unpacked to bytes before they are
// multiplied:
//
//   sum over the columns of a group of code * byte, a whole number;
//   out += scale of the weights * scale of the tokens * (sum + what the zero points make of the sum of the bytes)
//
// Strips of kRows rows, kStrips of them side by side, times kBlock tokens: their sums stay in registers for a group.
#pragma once

#include "packed.h"
#include "packed_round.h"
#include "packed_unpack.h"

namespace pennyweight {
namespace {

// Where the strips of a product are, at some group; codes of panels are bytes.
template <int kStrips>
struct Strips {
  const std::uint8_t* codes[kStrips];
  const std::uint8_t* scales[kStrips];
  const std::uint8_t* zeros[kStrips];
  const std::uint8_t* ends[kStrips];  // of the codes of the tile; null for panels
};

// Codes are asked for so many bytes before they are read, but a tile at most; scales, a tile before. Processors follow
// a stream by themselves, but not from the end of one tile's codes to the next tile's, nor over the border of a page.
// The second cache waits for more lines at a time than the first can.
constexpr std::size_t kAhead = 8192;

PENNYWEIGHT_INLINE void ask_for(const void* memory, std::size_t bytes) {
  const std::uint8_t* at = static_cast<const std::uint8_t*>(memory);
  for (std::size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
}

template <class L, int kStrips>
PENNYWEIGHT_INLINE void prefetch_group(const PackedWeights& w, const Strips<kStrips>& at) {
  if (at.ends[0] == nullptr) return;
  constexpr std::size_t kTiles = static_cast<std::size_t>(kStrips * L::kRows) / kTileRows;
  const std::size_t bytes = group_bytes(w);
  const std::size_t ahead = kAhead < w.code_bytes ? kAhead : w.code_bytes;
  for (int s = 0; s < kStrips; s += static_cast<int>(kTileRows) / L::kRows) {
    const std::uint8_t* soon = at.codes[s] + ahead;
    if (soon >= at.ends[s]) soon += kTiles * w.tile_bytes - w.code_bytes;
    ask_for(soon, bytes);
    __builtin_prefetch(at.scales[s] + kTiles * w.tile_bytes, 0, 2);
  }
}

// A block of tokens at the same group.
struct TokensAt {
  const std::int32_t* words;
  const std::int32_t* sums;
  const std::int32_t* starts;
  const float* scales;
};

// Results: out[t * stride + row] += factor * product. Sums go on where they were, so that columns may be cut anywhere.
struct Target {
  float* out;
  std::size_t stride;
  float factor;
  bool has_zeros;  // whether zero points that are floats count
};

template <class L, int kStrips, int kBlock, int kBits, bool kWide, int q, int kQuads>
PENNYWEIGHT_INLINE void add_quads(const std::uint8_t* const* chunks, const std::int32_t* words,
                                  typename L::Ints (&sums)[kStrips][kBlock]) {
  if constexpr (q < kQuads) {
    typename L::Bytes codes[kStrips];
    PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) codes[s] = quad_of<L, kBits, kQuads, q>(chunks[s]);
    PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) {
      const typename L::Bytes word = L::spread(words[q * kBlock + t]);
      PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) sums[s][t] =
          L::template dot<kWide>(sums[s][t], codes[s], word);
    }
    add_quads<L, kStrips, kBlock, kBits, kWide, q + 1, kQuads>(chunks, words, sums);
  }
}

// `groups` groups of all strips.
// Not inlined: inside a larger function its sums would not stay in registers, and compiling would take minutes.
template <class L, int kStrips, int kBlock, int kBits, bool kWide>
__attribute__((noinline)) void add_groups(const PackedWeights& w, Strips<kStrips> at, TokensAt block,
                                          std::size_t groups, const Target& result) {
  // Bytes are taken four quads at a time, so that groups of 16 columns are whole too.
  constexpr int kQuads = kBits == 8 ? 4 : 8;
  const std::size_t chunks = w.group / (4 * kQuads);
  const std::size_t scale_step = kTileRows * bytes_of(w.scale);
  const bool has_float = (w.zero == ZeroKind::kFloat || w.zero == ZeroKind::kOffset) && result.has_zeros;
  const bool has_factor = result.factor != 1.0f;
  typename L::Floats totals[kStrips][kBlock];
  PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) {
    PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) {
      totals[s][t] = L::load_floats(result.out + static_cast<std::size_t>(t) * result.stride + s * L::kRows);
    }
  }
  for (std::size_t g = 0; g < groups; ++g) {
    prefetch_group<L, kStrips>(w, at);
    typename L::Ints sums[kStrips][kBlock];
    PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) {
      if (w.zero == ZeroKind::kInteger) {
        const typename L::Ints zero = L::load_bytes(at.zeros[s]);
        PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) sums[s][t] = L::times(zero, -block.sums[t]);
        at.zeros[s] += kTileRows;
      } else {
        PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) sums[s][t] = L::ints(block.starts[t]);
      }
    }
    for (std::size_t c = 0; c < chunks; ++c, block.words += kQuads * kBlock) {
      add_quads<L, kStrips, kBlock, kBits, kWide, 0, kQuads>(at.codes, block.words, sums);
      PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) at.codes[s] += 8 * kBits * kQuads;
    }
    PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) {
      const typename L::Floats stored = L::load_floats(at.scales[s], w.scale);
      const typename L::Floats scale = has_factor ? L::product(stored, L::floats(result.factor)) : stored;
      PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) {
        totals[s][t] =
            L::add_product(totals[s][t], L::product(scale, L::floats(block.scales[t])), L::floats_of(sums[s][t]));
      }
      at.scales[s] += scale_step;
      if (has_float) {
        typename L::Floats zero = L::load_floats(at.zeros[s], w.scale);
        if (w.zero == ZeroKind::kFloat) zero = L::product(zero, stored);
        PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) {
          const float sum = block.scales[t] * static_cast<float>(block.sums[t]);
          totals[s][t] = L::add_product(totals[s][t], zero, L::floats(-sum));
        }
        at.zeros[s] += scale_step;
      }
    }
    block.sums += kBlock;
    block.starts += kBlock;
    block.scales += kBlock;
  }
  PENNYWEIGHT_UNROLL for (int s = 0; s < kStrips; ++s) {
    PENNYWEIGHT_UNROLL for (int t = 0; t < kBlock; ++t) {
      L::store_floats(result.out + static_cast<std::size_t>(t) * result.stride + s * L::kRows, totals[s][t]);
    }
  }
}

template <class L, int kStrips, int kBlock, bool kPanel>
void add_bits(const PackedWeights& w, const Strips<kStrips>& at, const TokensAt& block, std::size_t groups,
              const Target& result) {
  if constexpr (kPanel) {
    const bool is_wide = w.bits == 8 || w.table.count != 0;
    if (is_wide) return add_groups<L, kStrips, kBlock, 8, true>(w, at, block, groups, result);
    return add_groups<L, kStrips, kBlock, 8, L::kOnlyWide>(w, at, block, groups, result);
  } else {
    switch (w.bits) {
      case 2:
        return add_groups<L, kStrips, kBlock, 2, L::kOnlyWide>(w, at, block, groups, result);
      case 3:
        return add_groups<L, kStrips, kBlock, 3, L::kOnlyWide>(w, at, block, groups, result);
      case 4:
        return add_groups<L, kStrips, kBlock, 4, L::kOnlyWide>(w, at, block, groups, result);
      case 5:
        return add_groups<L, kStrips, kBlock, 5, L::kOnlyWide>(w, at, block, groups, result);
      case 6:
        return add_groups<L, kStrips, kBlock, 6, L::kOnlyWide>(w, at, block, groups, result);
      default:
        return add_groups<L, kStrips, kBlock, 8, true>(w, at, block, groups, result);
    }
  }
}

template <class L, int kStrips, bool kPanel>
void add_block(std::size_t size, const PackedWeights& w, const Strips<kStrips>& at, const TokensAt& block,
               std::size_t groups, const Target& result) {
  switch (size) {
    case 1:
      return add_bits<L, kStrips, 1, kPanel>(w, at, block, groups, result);
    case 2:
      return add_bits<L, kStrips, 2, kPanel>(w, at, block, groups, result);
    case 3:
      return add_bits<L, kStrips, 3, kPanel>(w, at, block, groups, result);
    case 4:
      return add_bits<L, kStrips, 4, kPanel>(w, at, block, groups, result);
    default:
      break;
  }
  if constexpr (L::kLargestBlock == 8) {
    switch (size) {
      case 6:
        return add_bits<L, kStrips, 6, kPanel>(w, at, block, groups, result);
      case 8:
        return add_bits<L, kStrips, 8, kPanel>(w, at, block, groups, result);
      default:
        break;
    }
  }
}

// Codes that are unpacked next, `bytes` of each of some tiles: asked for while the ones before are multiplied, a part
// for each block of tokens. Processors do not follow them by themselves from tile to tile.
template <std::size_t kTiles>
struct Ahead {
  const std::uint8_t* codes[kTiles];
  std::size_t bytes;
  std::size_t parts;

  // What comes after groups up to `end` of tile number i, which lies at `from`: after the last one the first of the
  // tiles that follow. Asking for what is not there does no harm.
  void follow(std::size_t i, const PackedWeights& w, const std::uint8_t* from, std::size_t end) {
    codes[i] = end == w.groups ? from + kTiles * w.tile_bytes : from + end * group_bytes(w);
  }

  void ask(std::size_t part) const {
    const std::size_t lines = (bytes / 64 + parts - 1) / parts;
    for (const std::uint8_t* tile : codes) {
      for (std::size_t line = part * lines; line < (part + 1) * lines && 64 * line < bytes; ++line) {
        __builtin_prefetch(tile + 64 * line, 0, 2);
      }
    }
  }
};

// Whether each block of tokens unpacks the codes for itself: with few blocks that takes less than a panel of bytes that
// is written once and read by all.
template <class L>
bool is_direct(const PackedWeights& w, std::size_t blocks) {
  if constexpr (L::kHasPlanes) {
    const bool is_one_plane = w.bits == 2 || w.bits == 4 || w.bits == 8;
    return w.table.count == 0 && w.group % 32 == 0 && blocks <= L::direct_blocks(is_one_plane);
  }
  return false;
}

// All tokens of a product times `kTiles` tiles from `tile` on, added to `sums` [tokens, kTiles * kTileRows].
template <class L, int kTiles>
void add_tiles(const PackedProduct& product, std::size_t tile, std::uint8_t* panel, float* sums) {
  constexpr int kPerTile = static_cast<int>(kTileRows) / L::kRows;
  constexpr int kStrips = kTiles * kPerTile;
  const PackedWeights& w = *product.weights;
  const RoundedTokens& tokens = product.tokens;
  const std::size_t count = (product.row_end - product.row_begin) * tokens.planes;
  const std::size_t blocks = (count + tokens.block - 1) / tokens.block;
  const bool has_panel = !is_direct<L>(w, blocks);
  const bool is_bytes = w.bits == 8 && w.table.count == 0;
  const std::size_t columns = has_panel ? kPanelColumnsAtOnce : kDirectColumnsAtOnce;
  const std::size_t step = blocks == 1 && !has_panel ? w.groups : columns / w.group;
  for (std::size_t begin = 0; begin < w.groups; begin += step) {
    const std::size_t groups = begin + step < w.groups ? step : w.groups - begin;
    for (std::size_t plane = 0; plane == 0 || plane < w.table.count; ++plane) {
      Strips<kStrips> at;
      Ahead<kTiles> ahead{{}, groups * group_bytes(w), blocks};
      for (int s = 0; s < kStrips; ++s) {
        const std::size_t row = static_cast<std::size_t>(s % kPerTile * L::kRows);
        const std::uint8_t* from = w.tiles + (tile + static_cast<std::size_t>(s / kPerTile)) * w.tile_bytes;
        std::uint8_t* unpacked = panel + static_cast<std::size_t>(s / kPerTile) * kTileRows * kPanelColumnsAtOnce;
        at.codes[s] = from + begin * group_bytes(w) + 4 * row;
        at.scales[s] = from + w.code_bytes + (begin * kTileRows + row) * bytes_of(w.scale);
        at.zeros[s] = from + w.code_bytes + w.scale_bytes + (begin * kTileRows + row) * zero_bytes(w);
        at.ends[s] = has_panel ? nullptr : from + w.code_bytes;
        ahead.follow(static_cast<std::size_t>(s / kPerTile), w, from, begin + groups);
        if (!has_panel || is_bytes) continue;
        if (row == 0) {
          unpack_groups<L>(w, at.codes[s], groups, w.table.count != 0 ? w.table.bytes[plane] : nullptr, unpacked);
        }
        at.codes[s] = unpacked + 4 * row;
      }
      const float factor = w.table.count != 0 ? w.table.factors[plane] : 1.0f;
      for (std::size_t b = 0; b < blocks; ++b) {
        const std::size_t first = (b * w.groups + begin) * tokens.block;
        const TokensAt block{tokens.words + first * (w.group / 4), tokens.sums + first, product.starts + first,
                             tokens.scales + first};
        const Target result{sums + b * tokens.block * kTiles * kTileRows, kTiles * kTileRows, factor, plane == 0};
        if (plane == 0 && (has_panel || blocks > 1)) ahead.ask(b);
        if constexpr (L::kHasPlanes) {
          if (!has_panel) {
            add_block<L, kStrips, false>(tokens.block, w, at, block, groups, result);
            // The first block has read the codes.
            for (int s = 0; s < kStrips; ++s) at.ends[s] = nullptr;
            continue;
          }
        }
        add_block<L, kStrips, true>(tokens.block, w, at, block, groups, result);
      }
    }
  }
}

// Sums [tokens, stride] of the rows of a tile to the result.
inline void write_tile(const PackedProduct& product, std::size_t tile, const float* sums, std::size_t stride) {
  const PackedWeights& w = *product.weights;
  const std::size_t first = tile * kTileRows;
  const std::size_t rows = w.rows - first < kTileRows ? w.rows - first : kTileRows;
  const std::size_t planes = product.tokens.planes;
  for (std::size_t m = product.row_begin; m < product.row_end; ++m) {
    float values[kTileRows];
    const float* sum = sums + (m - product.row_begin) * planes * stride;
    for (std::size_t r = 0; r < kTileRows; ++r) values[r] = sum[r];
    for (std::size_t p = 1; p < planes; ++p) {
      for (std::size_t r = 0; r < kTileRows; ++r) values[r] += sum[p * stride + r];
    }
    for (std::size_t r = 0; r < kTileRows; ++r) values[r] *= w.unit;
    if (product.bias != nullptr) {
      for (std::size_t r = 0; r < rows; ++r) values[r] += product.bias[first + r];
    }
    const std::size_t at = m * w.rows + first;
    if (product.out_kind == FloatKind::kFloat32) {
      float* out = static_cast<float*>(product.out) + at;
      if (rows == kTileRows) {
        __builtin_memcpy(out, values, sizeof values);  // one store
      } else {
        for (std::size_t r = 0; r < rows; ++r) out[r] = values[r];
      }
    } else {
      for (std::size_t r = 0; r < rows; ++r) {
        static_cast<std::uint16_t*>(product.out)[at + r] = narrowed(values[r], product.out_kind);
      }
    }
  }
}

template <class L>
void multiply_tiles(const PackedProduct& product) {
  std::uint8_t* panel = static_cast<std::uint8_t*>(product.scratch);
  float* sums = reinterpret_cast<float*>(panel + 2 * kTileRows * kPanelColumnsAtOnce);
  const std::size_t count = (product.row_end - product.row_begin) * product.tokens.planes;
  const std::size_t tokens = (count + product.tokens.block - 1) / product.tokens.block * product.tokens.block;
  for (std::size_t tile = product.tile_begin; tile < product.tile_end;) {
    for (std::size_t i = 0; i < 2 * kTileRows * tokens; ++i) sums[i] = 0.0f;
    // One token waits for memory, which is fastest along one line.
    if (L::kTiles == 2 && tokens > 1 && tile + 2 <= product.tile_end) {
      add_tiles<L, L::kTiles>(product, tile, panel, sums);
      write_tile(product, tile, sums, L::kTiles * kTileRows);
      write_tile(product, tile + L::kTiles - 1, sums + (L::kTiles - 1) * kTileRows, L::kTiles * kTileRows);
      tile += L::kTiles;
    } else {
      add_tiles<L, 1>(product, tile, panel, sums);
      write_tile(product, tile, sums, kTileRows);
      ++tile;
    }
  }
}

template <class L>
std::uint64_t read_bytes(const void* bytes, std::size_t count) {
  constexpr std::size_t kVectors = 8;
  constexpr std::size_t kStep = kVectors * sizeof(typename L::Bytes);
  const std::uint8_t* from = static_cast<const std::uint8_t*>(bytes);
  typename L::Bytes mixed[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) mixed[v] = L::spread(0);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (std::size_t v = 0; v < kVectors; ++v) mixed[v] = L::mix(mixed[v], L::load(from + i + v * sizeof mixed[v]));
  }
  std::uint8_t last[kStep];
  for (std::size_t v = 0; v < kVectors; ++v) L::store(last + v * sizeof mixed[v], mixed[v]);
  std::uint64_t result = 0;
  for (std::size_t k = 0; k < kStep; ++k) result = result * 31 + last[k];
  for (; i < count; ++i) result = result * 31 + from[i];
  return result;
}

}  // namespace
}  // namespace pennyweight
