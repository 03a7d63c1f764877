// Products with packed weights by matrix instructions (Intel since Sapphire Rapids). A tile of packed weights,
// unpacked, has the order in which these instructions take it. Two tiles of 16 rows times two blocks of 16 tokens at a
// time: their sums over a group, whole numbers, go through memory to the vectors that scale them.
#include "packed_lanes_avx512.h"

namespace pennyweight {
namespace {

// Of a tile of sums, and bytes of one of its rows.
constexpr std::size_t kSums = kMatrixBlock * kTileRows;
constexpr std::size_t kRowBytes = 4 * kTileRows;
// Two blocks times two tiles.
constexpr std::size_t kUnits = 4;
// Columns that one instruction takes at most: larger groups take two.
constexpr std::size_t kMostColumns = 64;
// Tiles of weights, and columns of them, that are unpacked at a time, and groups whose sums wait to be scaled: all that
// and two blocks of tokens fit into the first cache.
constexpr std::size_t kTilesAtOnce = 4;
constexpr std::size_t kColumnsAtOnce = 256;
constexpr std::size_t kGroupsAtOnce = 4;
constexpr std::size_t kSumsOfToken = kTilesAtOnce * kTileRows;
static_assert(kTilesAtOnce * kTileRows * kColumnsAtOnce + kMostTokens * kSumsOfToken * sizeof(float) <= kScratchBytes);

// Compilers do not know what memory instructions of tiles read.
inline void memory_is_read() { __asm__ volatile("" ::: "memory"); }

// Columns of one instruction.
std::size_t columns_of(std::size_t group) { return group > kMostColumns ? group / 2 : group; }

// Registers 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights.
void set_shapes(std::size_t columns) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  } shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.rows[tile] = static_cast<std::uint8_t>(tile < 6 ? kMatrixBlock : columns / 4);
    shapes.row_bytes[tile] = static_cast<std::uint16_t>(tile == 4 || tile == 5 ? columns : kRowBytes);
  }
  memory_is_read();
  _tile_loadconfig(&shapes);
}

// What unpacked codes of some groups of a tile are moved by, so that they are signed bytes, and what is missing then in
// a row and group.
struct Moved {
  bool is_integer;  // zero points that are codes
  bool has_rest;    // codes of 8 bits, or zero points far above the codes
  std::int32_t smallest, by;

  void choose(const PackedWeights& w, const std::uint8_t* zeros, std::size_t groups) {
    is_integer = w.zero == ZeroKind::kInteger;
    smallest = w.smallest;
    const std::int32_t largest = (1 << (w.table.count != 0 ? 8 : w.bits)) - 1;
    has_rest = is_integer ? largest > 127 : smallest + largest > 127;
    for (std::size_t i = 0; is_integer && i < groups * kTileRows; ++i) has_rest |= zeros[i] > 128;
    by = !has_rest ? smallest : largest > 127 ? -128 : 0;
  }

  // The codes, in their place.
  void move(const PackedWeights& w, std::uint8_t* panel, const std::uint8_t* zeros, std::size_t groups) const {
    __m512i distance = _mm512_set1_epi8(static_cast<char>(by));
    for (std::size_t g = 0; g < groups; ++g) {
      if (is_integer && !has_rest) {
        // The zero point of a row, for its four columns of a quad.
        const __m512i rows =
            _mm512_mullo_epi32(Lanes512::load_bytes(zeros + g * kTileRows), Lanes512::ints(0x01010101));
        distance = _mm512_sub_epi8(_mm512_setzero_si512(), rows);
      }
      for (std::size_t quad = 0; quad < w.group / 4; ++quad, panel += kRowBytes) {
        Lanes512::store(panel, _mm512_add_epi8(Lanes512::load(panel), distance));
      }
    }
  }

  __m512i rest(const std::uint8_t* zeros, std::size_t g) const {
    if (!is_integer) return Lanes512::ints(smallest - by);
    return _mm512_sub_epi32(Lanes512::ints(-by), Lanes512::load_bytes(zeros + g * kTileRows));
  }
};

// Some groups of a tile of weights, and of a block of tokens.
struct Tile {
  const std::uint8_t* panel;
  const std::uint8_t* scales;
  const std::uint8_t* zeros;
  Moved moved;
};
struct Block {
  const std::int8_t* bytes;
  const std::int32_t* sums;
  const float* scales;
};

// Sums [groups, 2 blocks, 2 tiles, tokens, rows] over groups [begin, end). Those of a group are stored when the next
// one begins, since an instruction that waits for one before holds up all that follow.
__attribute__((noinline)) void sum_groups(const Tile* tiles, const Block* blocks, std::size_t group, std::size_t begin,
                                          std::size_t end, std::int32_t* sums) {
  const std::size_t columns = columns_of(group);
  memory_is_read();
  for (std::size_t g = begin; g < end; ++g) {
    const std::int8_t* x[2] = {blocks[0].bytes + g * kMatrixBlock * group, blocks[1].bytes + g * kMatrixBlock * group};
    const std::uint8_t* w[2] = {tiles[0].panel + g * group * kTileRows, tiles[1].panel + g * group * kTileRows};
    const bool has_last = g != begin;
    std::int32_t* last = has_last ? sums + (g - begin - 1) * kUnits * kSums : nullptr;
    _tile_loadd(4, x[0], group);
    _tile_loadd(6, w[0], kRowBytes);
    if (has_last) _tile_stored(0, last, kRowBytes);
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w[1], kRowBytes);
    if (has_last) _tile_stored(1, last + kSums, kRowBytes);
    _tile_zero(1);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x[1], group);
    if (has_last) _tile_stored(2, last + 2 * kSums, kRowBytes);
    _tile_zero(2);
    _tile_dpbssd(2, 5, 6);
    if (has_last) _tile_stored(3, last + 3 * kSums, kRowBytes);
    _tile_zero(3);
    _tile_dpbssd(3, 5, 7);
    if (columns == group) continue;
    _tile_loadd(4, x[0] + columns, group);
    _tile_loadd(6, w[0] + columns * kTileRows, kRowBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w[1] + columns * kTileRows, kRowBytes);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x[1] + columns, group);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  sums += (end - begin - 1) * kUnits * kSums;
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kSums, kRowBytes);
  _tile_stored(2, sums + 2 * kSums, kRowBytes);
  _tile_stored(3, sums + 3 * kSums, kRowBytes);
}

// Sums of a block and a tile, scaled, to the result.
__attribute__((noinline)) void add_scaled(const PackedWeights& w, const Tile& tile, const Block& block,
                                          std::size_t begin, std::size_t end, const std::int32_t* sums,
                                          const Target& result) {
  const std::size_t float_step = kTileRows * bytes_of(w.scale);
  const bool has_float = (w.zero == ZeroKind::kFloat || w.zero == ZeroKind::kOffset) && result.has_zeros;
  __m512 totals[kMatrixBlock];
  PENNYWEIGHT_UNROLL for (std::size_t t = 0; t < kMatrixBlock; ++t) {
    totals[t] = _mm512_loadu_ps(result.out + t * result.stride);
  }
  for (std::size_t g = begin; g < end; ++g, sums += kUnits * kSums) {
    const float* factors = block.scales + g * kMatrixBlock;
    const std::int32_t* all = block.sums + g * kMatrixBlock;
    const __m512 stored = Lanes512::load_floats(tile.scales + g * float_step, w.scale);
    const __m512 scale = _mm512_mul_ps(stored, _mm512_set1_ps(result.factor));
    if (tile.moved.has_rest) {
      const __m512i rest = tile.moved.rest(tile.zeros, g);
      PENNYWEIGHT_UNROLL for (std::size_t t = 0; t < kMatrixBlock; ++t) {
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + t * kTileRows), Lanes512::times(rest, all[t]));
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(factors[t]));
        totals[t] = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(sum), totals[t]);
      }
    } else {
      PENNYWEIGHT_UNROLL for (std::size_t t = 0; t < kMatrixBlock; ++t) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + t * kTileRows));
        totals[t] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(factors[t])), sum, totals[t]);
      }
    }
    if (has_float) {
      __m512 zero = Lanes512::load_floats(tile.zeros + g * float_step, w.scale);
      if (w.zero == ZeroKind::kFloat) zero = _mm512_mul_ps(zero, stored);
      PENNYWEIGHT_UNROLL for (std::size_t t = 0; t < kMatrixBlock; ++t) {
        const float less = factors[t] * static_cast<float>(all[t]);
        totals[t] = _mm512_fmadd_ps(zero, _mm512_set1_ps(-less), totals[t]);
      }
    }
  }
  PENNYWEIGHT_UNROLL for (std::size_t t = 0; t < kMatrixBlock; ++t) {
    _mm512_storeu_ps(result.out + t * result.stride, totals[t]);
  }
}

// A product, and where its parts are.
struct Matrices {
  const PackedProduct& product;
  std::size_t blocks;  // of tokens
  std::uint8_t* panel;
  float* sums;  // [tokens, kTilesAtOnce, kTileRows]
};

// All tokens times groups [begin, begin + groups), kColumnsAtOnce columns at most, of `count` tiles from `first` on.
void add_panel(const Matrices& all, std::size_t first, std::size_t count, std::size_t begin, std::size_t groups,
               std::size_t plane) {
  const PackedWeights& w = *all.product.weights;
  const RoundedTokens& tokens = all.product.tokens;
  const bool is_table = w.table.count != 0;
  Tile tiles[kTilesAtOnce];
  Ahead<kTilesAtOnce> ahead{{}, groups * group_bytes(w), (all.blocks + 1) / 2};
  for (std::size_t i = 0; i < kTilesAtOnce; ++i) {
    const std::uint8_t* from = w.tiles + (first + (i < count ? i : 0)) * w.tile_bytes;
    std::uint8_t* panel = all.panel + (i < count ? i : 0) * kTileRows * kColumnsAtOnce;
    tiles[i] = {panel,
                from + w.code_bytes + begin * kTileRows * bytes_of(w.scale),
                from + w.code_bytes + w.scale_bytes + begin * kTileRows * zero_bytes(w),
                {}};
    ahead.follow(i, w, from, begin + groups);
    if (i >= count) continue;
    unpack_groups<Lanes512>(w, from + begin * group_bytes(w), groups, is_table ? w.table.bytes[plane] : nullptr, panel);
    tiles[i].moved.choose(w, tiles[i].zeros, groups);
    tiles[i].moved.move(w, panel, tiles[i].zeros, groups);
  }
  alignas(64) std::int32_t sums[kGroupsAtOnce * kUnits * kSums];
  const float factor = is_table ? w.table.factors[plane] : 1.0f;
  for (std::size_t b = 0; b < all.blocks; b += 2) {
    if (plane == 0) ahead.ask(b / 2);
    Block blocks[2];
    for (std::size_t i = 0; i < 2; ++i) {
      // A block that is not there is the one before.
      const std::size_t fields = ((b + i < all.blocks ? b + i : b) * w.groups + begin) * kMatrixBlock;
      blocks[i] = {reinterpret_cast<const std::int8_t*>(tokens.words + fields * (w.group / 4)), tokens.sums + fields,
                   tokens.scales + fields};
    }
    for (std::size_t i = 0; i < count; i += 2) {
      for (std::size_t g = 0; g < groups; g += kGroupsAtOnce) {
        const std::size_t end = g + kGroupsAtOnce < groups ? g + kGroupsAtOnce : groups;
        sum_groups(tiles + i, blocks, w.group, g, end, sums);
        for (std::size_t unit = 0; unit < kUnits; ++unit) {
          const std::size_t block = b + unit / 2, tile = i + unit % 2;
          if (block >= all.blocks || tile >= count) continue;
          float* out = all.sums + block * kMatrixBlock * kSumsOfToken + tile * kTileRows;
          add_scaled(w, tiles[tile], blocks[unit / 2], g, end, sums + unit * kSums,
                     Target{out, kSumsOfToken, factor, plane == 0});
        }
      }
    }
  }
}

}  // namespace

void multiply_by_matrices(const PackedProduct& product) {
  if (!product.tokens.is_matrix) return kPackedAvx512Vnni.multiply(product);
  const PackedWeights& w = *product.weights;
  const std::size_t tokens = (product.row_end - product.row_begin) * product.tokens.planes;
  std::uint8_t* panel = static_cast<std::uint8_t*>(product.scratch);
  float* sums = reinterpret_cast<float*>(panel + kTilesAtOnce * kTileRows * kColumnsAtOnce);
  const Matrices all{product, (tokens + kMatrixBlock - 1) / kMatrixBlock, panel, sums};
  const std::size_t step = kColumnsAtOnce / w.group;
  // Planes of tables take turns as they do without matrices, so that sums are the same to the last bit.
  const std::size_t panel_groups = kPanelColumnsAtOnce / w.group;
  set_shapes(columns_of(w.group));
  for (std::size_t tile = product.tile_begin; tile < product.tile_end; tile += kTilesAtOnce) {
    const std::size_t left = product.tile_end - tile;
    const std::size_t count = left < kTilesAtOnce ? left : kTilesAtOnce;
    for (std::size_t i = 0; i < kSumsOfToken * kMatrixBlock * all.blocks; ++i) sums[i] = 0.0f;
    for (std::size_t begin = 0; begin < w.groups; begin += panel_groups) {
      const std::size_t end = begin + panel_groups < w.groups ? begin + panel_groups : w.groups;
      for (std::size_t plane = 0; plane == 0 || plane < w.table.count; ++plane) {
        for (std::size_t g = begin; g < end; g += step) {
          add_panel(all, tile, count, g, g + step < end ? step : end - g, plane);
        }
      }
    }
    for (std::size_t i = 0; i < count; ++i) write_tile(product, tile + i, sums + i * kTileRows, kSumsOfToken);
  }
  _tile_release();
}

}  // namespace pennyweight
