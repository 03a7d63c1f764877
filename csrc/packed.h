// Products with packed weights. The layout is that of pennyweight.kernels.layout: tiles of 16 rows, codes in planes of
// bits, then scales and zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pennyweight {

enum class FloatKind : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class ZeroKind : int { kNone = 0, kInteger = 1, kFloat = 2, kOffset = 3 };

constexpr std::size_t kTileRows = 16;
constexpr std::size_t kLargestGroup = 128;

constexpr std::int32_t kTableZero = 128;

// Static, as every function of this header must be: it is compiled for several instruction sets.
static constexpr std::size_t bytes_of(FloatKind kind) { return kind == FloatKind::kFloat32 ? 4 : 2; }

// The values of a table as bytes: value = the sum over the planes of factor * (byte - kTableZero).
struct TablePlanes {
  std::size_t count;  // 0 where values are whole numbers; else 1 to 3
  float factors[3];
  std::uint8_t bytes[3][256];
};

// What a header says, and where its parts lie.
struct PackedWeights {
  std::size_t rows, cols;
  std::size_t bits;    // of a stored code: 2, 3, 4, 5, 6 or 8
  std::size_t group;   // columns that share a scale, a multiple of 16
  std::size_t groups;  // in a row
  FloatKind scale;     // also of float zero points and offsets
  ZeroKind zero;
  std::int32_t smallest;   // value of code 0; with a table, of byte 0 of its planes
  std::size_t table_bits;  // 0, 4 or 8
  TablePlanes table;
  float unit;  // of all weights
  const std::uint8_t* tiles;
  std::size_t tile_bytes, code_bytes, scale_bytes;  // of a tile, of its codes, of its scales
};

// Bytes of a zero point of a row, and of the codes of a group of a tile.
static constexpr std::size_t zero_bytes(const PackedWeights& w) {
  return w.zero == ZeroKind::kInteger ? 1 : bytes_of(w.scale);
}
static constexpr std::size_t group_bytes(const PackedWeights& w) { return w.group * kTileRows * w.bits / 8; }

// Activations as signed bytes. A row of the input is one token, or three: its numbers to 8 bits, what is left of them
// to 8 more, and what is left of that; then their sum is as good as float32. For bfloat16 two are enough. Tokens come
// in blocks of `block`, the last one filled up with zeros.
struct RoundedTokens {
  // Four columns of a token in a word: [blocks, groups, group / 4, block], or for matrix instructions
  // [blocks, groups, block, group / 4].
  std::int32_t* words;
  std::int32_t* sums;  // [blocks, groups, block]: of the bytes of a group
  float* scales;       // [blocks, groups, block]: number = scale * byte
  std::size_t block;
  std::size_t planes;  // tokens of a row of the input: 1 to 3
  bool is_matrix;      // the second order of words
};

// Rows of an input, to be rounded in groups.
struct RoundTokens {
  const void* x;  // [rows, cols]
  FloatKind kind;
  std::size_t cols;
  std::size_t group;
  std::size_t row_begin, row_end;
  RoundedTokens out;
};

// Some tiles of a product with some tokens.
struct PackedProduct {
  const PackedWeights* weights;
  RoundedTokens tokens;
  const std::int32_t* starts;  // like tokens.sums, times the value of code 0
  std::size_t row_begin;       // rows of the input that all blocks of `tokens` begin with
  std::size_t row_end;
  std::size_t tile_begin, tile_end;
  const float* bias;  // [rows], or null
  void* out;          // [rows of the input, rows]
  FloatKind out_kind;
  void* scratch;  // kScratchBytes, aligned to 64 bytes
};

// Tokens that one call of `multiply` takes at most: each call reads all weights from memory. Columns that are unpacked
// at a time; columns that several blocks of tokens, each unpacking for itself, find in the second cache.
constexpr std::size_t kMostTokens = 528;
constexpr std::size_t kPanelColumnsAtOnce = 1024;
constexpr std::size_t kDirectColumnsAtOnce = 4096;
// Two tiles unpacked, and sums of all tokens for four.
constexpr std::size_t kScratchBytes = 2 * kTileRows * kPanelColumnsAtOnce + 4 * kTileRows * kMostTokens * sizeof(float);

enum class Activation : int { kSilu = 0, kGeluTanh = 1 };

// Positions of a cache come in runs of so many, whatever an instruction set takes at a time.
constexpr std::size_t kPositionsAtOnce = 16;

// Heads of one token that share keys and values.
struct Attention {
  const float* queries;  // [heads, width]
  const void* keys;      // [width, stride], float32 or bfloat16: positions lie side by side
  const void* values;    // [stride, width]
  FloatKind kind;
  std::size_t heads;
  std::size_t width;       // of a head, a multiple of 16
  std::size_t stride;      // positions that there is room for, a multiple of kPositionsAtOnce
  std::size_t begin, end;  // positions that are looked at
  float scale;
  float* scores;  // room for kHeadsAtOnce * stride
  float* out;     // [heads, width]
};

constexpr std::size_t kHeadsAtOnce = 4;
constexpr std::size_t kDenseTokens = 4;

// A product with weights that were not quantized.
struct DenseProduct {
  const void* weights;  // [rows, cols], float32 or bfloat16
  FloatKind kind;
  std::size_t rows, cols;
  const float* bias;       // [rows], or null
  const float* x;          // [tokens, cols]
  std::size_t tokens;      // kDenseTokens at most
  std::size_t begin, end;  // of the rows
  float* out;              // [tokens, rows]
};

struct PackedKernels {
  std::size_t largest_block;   // of tokens
  std::size_t one_of_several;  // the largest of several blocks
  std::size_t matrix_from;     // from so many tokens on they come in blocks of kMatrixBlock, for matrix instructions
  // Each group of a row rounded by its largest magnitude / 127, ties to even. A group with a number that is not finite
  // has the scale NaN. The twin in torch is pennyweight.kernels.packed.round_activations.
  void (*round)(const RoundTokens& tokens);
  // The twin in torch is pennyweight.kernels.packed._plain_product.
  void (*multiply)(const PackedProduct& product);
  // A digest of bytes: a plain read of memory, to compare with.
  std::uint64_t (*read)(const void* bytes, std::size_t count);
  // For whole models; see token_ops.h.
  void (*normalize)(const float* x, const float* weight, std::size_t count, float epsilon, float* out);
  void (*rotate)(float* x, const float* cosines, const float* sines, std::size_t count);
  void (*gate_by)(Activation kind, float* gate, const float* up, std::size_t count);
  void (*attend)(const Attention& attention);
  void (*multiply_dense)(const DenseProduct& product);
};

// The block sizes there are: `tokens` are cut into blocks of the size that wastes least.
constexpr std::size_t kBlockSizes[] = {1, 2, 3, 4, 6, 8};
constexpr std::size_t kMatrixBlock = 16;
constexpr std::size_t kNoMatrix = static_cast<std::size_t>(-1);

// What dispatch.cc chooses from; CMakeLists.txt decides which of them are built.
extern const PackedKernels kPackedScalar;
extern const PackedKernels kPackedAvx2;
extern const PackedKernels kPackedAvx2Vnni;
extern const PackedKernels kPackedAvx512;
extern const PackedKernels kPackedAvx512Vnni;
extern const PackedKernels kPackedNeon;

// In place of kPackedAvx512Vnni.multiply where there are matrix instructions; tokens below kMatrixBlock go to that.
void multiply_by_matrices(const PackedProduct& product);

}  // namespace pennyweight
