#include "packed_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace pennyweight {
namespace {

constexpr std::size_t kHeaderBytes = 64;
constexpr std::size_t kAlignment = 64;
// Tokens that are rounded at a time, so that memory is bounded.
constexpr std::size_t kTokensAtOnce = 2 * kMostTokens;

template <typename Number>
Number field(const std::uint8_t* bytes, std::size_t at) {
  Number x;
  std::memcpy(&x, bytes + at, sizeof x);
  return x;
}

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Values as sums of bytes: one plane where all are multiples of a step that bytes can count, else as many as float32
// needs. No code of a value that is not finite is ever packed: such values count as 0.
TablePlanes planes_of(float* values, std::size_t count) {
  TablePlanes planes{};
  std::replace_if(values, values + count, [](float x) { return !std::isfinite(x); }, 0.0f);
  float largest = 0.0f;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[i]));
  for (const float step : {1.0f, 0.5f}) {
    const bool is_whole = std::all_of(values, values + count, [&](float x) {
      return std::fabs(x / step) <= 127.0f && x / step == std::nearbyint(x / step);
    });
    if (!is_whole) continue;
    planes.count = 1;
    planes.factors[0] = step;
    for (std::size_t i = 0; i < count; ++i) {
      planes.bytes[0][i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(values[i] / step) + kTableZero);
    }
    return planes;
  }
  planes.count = 3;
  double factor = static_cast<double>(largest) / 127.0;
  std::vector<double> left(values, values + count);
  for (std::size_t plane = 0; plane < planes.count; ++plane, factor /= 254.0) {
    planes.factors[plane] = static_cast<float>(factor);
    for (std::size_t i = 0; i < count; ++i) {
      const double value = std::nearbyint(left[i] / factor);
      planes.bytes[plane][i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(value) + kTableZero);
      left[i] -= value * static_cast<double>(planes.factors[plane]);
    }
  }
  return planes;
}

// Memory that stays with its thread from call to call.
template <typename Number>
Number* room(std::size_t count, std::vector<std::uint8_t>& store) {
  const std::size_t bytes = count * sizeof(Number) + kAlignment;
  if (store.size() < bytes) store.resize(bytes);
  void* start = store.data();
  std::size_t space = store.size();
  return static_cast<Number*>(std::align(kAlignment, bytes - kAlignment, start, space));
}

struct Buffers {
  std::vector<std::uint8_t> words, sums, scales, starts, scratch;
};

// `tokens` cut into as few blocks as possible, these of the smallest size there is for them.
std::size_t block_size(std::size_t tokens, const PackedKernels& kernels) {
  const std::size_t largest = tokens > kernels.largest_block ? kernels.one_of_several : kernels.largest_block;
  const std::size_t blocks = (tokens + largest - 1) / largest;
  for (const std::size_t size : kBlockSizes) {
    if (size * blocks >= tokens && size <= largest) return size;
  }
  return largest;
}

// Rows of the input for one call of `multiply`: whole blocks, and about as many in each call.
std::size_t rows_of_a_turn(std::size_t rows, std::size_t planes, std::size_t block) {
  const std::size_t most = kMostTokens / planes / block * block;
  const std::size_t turns = (rows + most - 1) / most;
  return ((rows + turns - 1) / turns + block - 1) / block * block;
}

// Bytes that hold a number as well as float32, or as bfloat16: the second has 8 bits, and gets 15 of the largest.
std::size_t exact_planes(FloatKind kind) { return kind == FloatKind::kBFloat16 ? 2 : 3; }

struct Rounding {
  RoundTokens tokens;
  const PackedKernels* kernels;
  std::size_t rows;
};

void round_some(void* context, std::size_t, std::size_t index) {
  const Rounding& all = *static_cast<Rounding*>(context);
  RoundTokens some = all.tokens;
  const std::size_t step = some.row_end;
  some.row_begin = index * step;
  some.row_end = std::min(some.row_begin + step, all.rows);
  all.kernels->round(some);
}

// All products of one rounding: pieces of tiles, one matrix after the other, for each group of blocks of tokens.
struct Work {
  const std::vector<Product>* products;
  std::size_t first, last;          // of the products
  std::vector<std::size_t> pieces;  // [last - first + 1]: the first piece of each
  std::size_t tiles;                // of a piece
  PackedProduct shared;             // all that products have in common
  std::size_t rows;                 // of the input
  std::size_t rows_at_once;
  std::size_t first_row;  // of these rows in the whole input
  std::uint8_t* scratch;
  const PackedKernels* kernels;
};

void multiply_some(void* context, std::size_t thread, std::size_t index) {
  const Work& work = *static_cast<Work*>(context);
  const std::size_t turn = index / work.pieces.back();
  const std::size_t piece = index % work.pieces.back();
  const auto after = std::upper_bound(work.pieces.begin(), work.pieces.end(), piece);
  const std::size_t number = static_cast<std::size_t>(after - work.pieces.begin()) - 1;
  const Product& product = (*work.products)[work.first + number];
  const PackedWeights& weights = *product.weights;
  const std::size_t all_tiles = (weights.rows + kTileRows - 1) / kTileRows;
  const std::size_t float_bytes = bytes_of(work.shared.out_kind);
  PackedProduct some = work.shared;
  some.weights = &weights;
  some.bias = product.bias;
  some.row_begin = turn * work.rows_at_once;
  some.row_end = std::min(some.row_begin + work.rows_at_once, work.rows);
  const std::size_t offset = some.row_begin * some.tokens.planes * weights.groups;
  some.tokens.words += offset * (weights.group / 4);
  some.tokens.sums += offset;
  some.tokens.scales += offset;
  some.starts += offset;
  some.tile_begin = (piece - work.pieces[number]) * work.tiles;
  some.tile_end = std::min(some.tile_begin + work.tiles, all_tiles);
  some.out = static_cast<std::uint8_t*>(product.out) + work.first_row * weights.rows * float_bytes;
  some.scratch = work.scratch + thread * kScratchBytes;
  work.kernels->multiply(some);
}

// Products [first, last), which agree in group and value of code 0, with some rows of the input.
void multiply_run(const RoundTokens& input, std::size_t first_row, std::size_t planes,
                  const std::vector<Product>& products, std::size_t first, std::size_t last, std::size_t threads,
                  const PackedKernels& kernels) {
  static thread_local Buffers buffers;
  const PackedWeights& weights = *products[first].weights;
  const std::size_t rows = input.row_end;
  const std::size_t tokens = rows * planes;
  const bool is_matrix = tokens >= kernels.matrix_from;
  const std::size_t block = is_matrix ? kMatrixBlock : block_size(tokens, kernels);
  const std::size_t padded = (tokens + block - 1) / block * block;
  const std::size_t fields = padded * weights.groups;
  Rounding rounding{input, &kernels, rows};
  RoundedTokens& rounded = rounding.tokens.out;
  rounded = {room<std::int32_t>(fields * weights.group / 4, buffers.words),
             room<std::int32_t>(fields, buffers.sums),
             room<float>(fields, buffers.scales),
             block,
             planes,
             is_matrix};
  if (padded != tokens) {
    std::memset(rounded.words, 0, fields * weights.group);
    std::memset(rounded.sums, 0, fields * sizeof(std::int32_t));
    std::memset(rounded.scales, 0, fields * sizeof(float));
  }
  rounding.tokens.group = weights.group;
  rounding.tokens.row_end = std::max<std::size_t>(1, std::min<std::size_t>(8, rows));
  const std::size_t parts = (rows + rounding.tokens.row_end - 1) / rounding.tokens.row_end;
  in_parallel(threads, parts, round_some, &rounding);
  std::int32_t* starts = room<std::int32_t>(fields, buffers.starts);
  for (std::size_t i = 0; i < fields; ++i) starts[i] = rounded.sums[i] * weights.smallest;

  Work work{&products, first,   last,    {0}, 0, {}, rows, rows_of_a_turn(rows, planes, block),
            first_row, nullptr, &kernels};
  std::size_t all_tiles = 0;
  for (std::size_t i = first; i < last; ++i) all_tiles += (products[i].weights->rows + kTileRows - 1) / kTileRows;
  // Pieces of an even number of tiles, several for each thread, so that one that is held up does not hold up all.
  work.tiles = std::max<std::size_t>(2, all_tiles / (threads * 8) / 2 * 2);
  for (std::size_t i = first; i < last; ++i) {
    const std::size_t tiles = (products[i].weights->rows + kTileRows - 1) / kTileRows;
    work.pieces.push_back(work.pieces.back() + (tiles + work.tiles - 1) / work.tiles);
  }
  work.shared.tokens = rounded;
  work.shared.starts = starts;
  work.shared.out_kind = input.kind;
  work.scratch = room<std::uint8_t>(threads * kScratchBytes, buffers.scratch);
  const std::size_t turns = (rows + work.rows_at_once - 1) / work.rows_at_once;
  in_parallel(threads, turns * work.pieces.back(), multiply_some, &work);
}

struct Read {
  const std::uint8_t* bytes;
  std::size_t count, step;
  const PackedKernels* kernels;
  std::vector<std::uint64_t> digests;
};

void read_some(void* context, std::size_t, std::size_t index) {
  Read& read = *static_cast<Read*>(context);
  const std::size_t begin = index * read.step;
  read.digests[index] = read.kernels->read(read.bytes + begin, std::min(read.step, read.count - begin));
}

}  // namespace

PackedWeights parse_packed(const std::uint8_t* storage, std::size_t bytes) {
  if (bytes < kHeaderBytes || std::memcmp(storage, "PWPACKED", 8) != 0) {
    throw std::invalid_argument("packed weights: there is no header");
  }
  PackedWeights w{};
  w.rows = field<std::uint32_t>(storage, 8);
  w.cols = field<std::uint32_t>(storage, 12);
  w.bits = storage[16];
  const std::uint8_t scale = storage[17], zero = storage[18];
  w.table_bits = storage[19];
  w.group = field<std::uint16_t>(storage, 20);
  const bool has_bits = w.bits == 8 || (w.bits >= 2 && w.bits <= 6);
  const bool has_table = w.table_bits == 0 || w.table_bits == 8 || (w.table_bits == 4 && w.bits <= 4);
  // Of whole numbers only: zero points that are codes, and the value of code 0, by which sums are multiplied.
  const float smallest = field<float>(storage, 24);
  const bool is_code = w.table_bits != 0 ? smallest == 0.0f && zero != 1
                                         : std::fabs(smallest) <= 128.0f && smallest == std::nearbyint(smallest);
  const bool has_group =
      w.group >= 16 && w.group <= kLargestGroup && w.group % (w.bits == 3 || w.bits == 5 ? 32 : 16) == 0;
  if (!has_bits || !has_table || !has_group || !is_code || scale > 2 || zero > 3 ||
      field<std::uint16_t>(storage, 22) != kTileRows || w.rows == 0 || w.cols == 0) {
    throw std::invalid_argument("packed weights: the header is not one of this version");
  }
  w.scale = static_cast<FloatKind>(scale);
  w.zero = static_cast<ZeroKind>(zero);
  w.smallest = w.table_bits != 0 ? -kTableZero : static_cast<std::int32_t>(smallest);
  w.unit = field<float>(storage, 28);
  w.groups = (w.cols + w.group - 1) / w.group;
  const std::size_t table_bytes = w.table_bits != 0 ? sizeof(float) << w.table_bits : 0;
  if (bytes < kHeaderBytes + table_bytes) throw std::invalid_argument("packed weights: bytes are missing");
  if (w.table_bits != 0) {
    std::vector<float> values(table_bytes / sizeof(float));
    std::memcpy(values.data(), storage + kHeaderBytes, table_bytes);
    w.table = planes_of(values.data(), values.size());
  }
  const std::size_t float_bytes = bytes_of(w.scale);
  w.code_bytes = w.groups * w.group * kTileRows * w.bits / 8;
  w.scale_bytes = aligned(w.groups * kTileRows * float_bytes);
  const std::size_t zero_bytes[] = {0, aligned(w.groups * kTileRows), w.scale_bytes, w.scale_bytes};
  w.tile_bytes = w.code_bytes + w.scale_bytes + zero_bytes[zero];
  w.tiles = storage + kHeaderBytes + table_bytes;
  // Divided, since the product of what a damaged header says can be beyond 64 bits.
  const std::size_t tiles = (bytes - kHeaderBytes - table_bytes) / w.tile_bytes;
  if (tiles * w.tile_bytes != bytes - kHeaderBytes - table_bytes || tiles != (w.rows + kTileRows - 1) / kTileRows) {
    throw std::invalid_argument("packed weights: " + std::to_string(bytes) + " bytes are not what the header says");
  }
  return w;
}

void multiply_packed(const void* x, FloatKind kind, std::size_t rows, std::size_t cols, bool is_exact,
                     const std::vector<Product>& products, std::size_t threads, const PackedKernels& kernels) {
  threads = std::max<std::size_t>(1, threads);
  const std::size_t planes = is_exact ? exact_planes(kind) : 1;
  const std::size_t rows_at_once = kTokensAtOnce / planes;
  const std::size_t float_bytes = bytes_of(kind);
  for (std::size_t row = 0; row < rows; row += rows_at_once) {
    const std::uint8_t* from = static_cast<const std::uint8_t*>(x) + row * cols * float_bytes;
    const RoundTokens input{from, kind, cols, 0, 0, std::min(rows_at_once, rows - row), {}};
    for (std::size_t first = 0, last; first < products.size(); first = last) {
      const PackedWeights& w = *products[first].weights;
      for (last = first + 1; last < products.size(); ++last) {
        const PackedWeights& other = *products[last].weights;
        if (other.group != w.group || other.smallest != w.smallest) break;
      }
      multiply_run(input, row, planes, products, first, last, threads, kernels);
    }
  }
}

std::uint64_t read_memory(const std::uint8_t* bytes, std::size_t count, std::size_t threads,
                          const PackedKernels& kernels) {
  const std::size_t step = std::max<std::size_t>(4096, count / (std::max<std::size_t>(1, threads) * 8) / 4096 * 4096);
  Read read{bytes, count, step, &kernels, std::vector<std::uint64_t>((count + step - 1) / step)};
  in_parallel(threads, read.digests.size(), read_some, &read);
  std::uint64_t digest = 0;
  for (const std::uint64_t part : read.digests) digest = digest * 31 + part;
  return digest;
}

}  // namespace pennyweight
