// Products with packed weights on every kernel table of a processor, compared with sums of this file's own; `make neon`
// runs it in an emulator.
//
// products NAME...    NAME: the tables that there must be, best first
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"
#include "../../csrc/packed_call.h"

namespace {

using pennyweight::FloatKind;
using pennyweight::ZeroKind;

// float32 sums of different order, and activations and tables as sums of bytes; seen: 4e-7.
constexpr double kTolerance = 2e-6;
// Sums of at most 83 products of normal numbers, in another order.
constexpr float kPartsTolerance = 2e-5f;

std::mt19937 numbers(1);
int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(numbers); }
float normal() { return std::normal_distribution<float>()(numbers); }

struct Case {
  std::size_t rows, cols, bits, group, tokens, table_bits;
  FloatKind scale;
  ZeroKind zero;
  bool is_whole;  // numbers of which all products are exact
};

void put(std::vector<std::uint8_t>& bytes, std::size_t at, const void* what, std::size_t count) {
  std::memcpy(bytes.data() + at, what, count);
}

void put_float(std::vector<std::uint8_t>& bytes, std::size_t at, float x, FloatKind kind) {
  if (kind == FloatKind::kFloat32) return put(bytes, at, &x, 4);
  std::uint32_t word;
  std::memcpy(&word, &x, 4);
  // Only for numbers that both types hold: normal ones of float16, with few bits.
  const std::uint32_t half =
      kind == FloatKind::kBFloat16
          ? word >> 16
          : ((word >> 16) & 0x8000u) | ((word & 0x7fffffffu) == 0 ? 0 : (((word & 0x7fffffffu) - 0x38000000u) >> 13));
  put(bytes, at, &half, 2);
}

// A number that every kind of float holds exactly.
float stored(const Case& c) {
  const float sign = whole(0, 1) ? 1.0f : -1.0f;
  if (c.is_whole) return sign * std::ldexp(1.0f, whole(-1, 1));
  return sign * std::ldexp(static_cast<float>(whole(128, 255)), whole(-10, -7));
}

struct Weights {
  std::vector<std::uint8_t> storage;
  std::vector<double> values, sizes;  // [rows, cols]: the weight, and the size of what it is a difference of
};

// Written from the description of the layout, one code at a time.
Weights pack(const Case& c) {
  const std::size_t tiles = (c.rows + 15) / 16, groups = (c.cols + c.group - 1) / c.group;
  const std::size_t float_bytes = c.scale == FloatKind::kFloat32 ? 4 : 2;
  const std::size_t code_bytes = groups * c.group * 2 * c.bits;
  const std::size_t scale_bytes = (groups * 16 * float_bytes + 63) / 64 * 64;
  const std::size_t zero_size = c.zero == ZeroKind::kInteger ? 1 : float_bytes;
  const std::size_t zero_bytes = c.zero == ZeroKind::kNone ? 0 : (groups * 16 * zero_size + 63) / 64 * 64;
  const std::size_t values = c.table_bits == 0 ? 0 : std::size_t{1} << c.table_bits;
  const std::size_t tile_bytes = code_bytes + scale_bytes + zero_bytes, head = 64 + 4 * values;
  Weights w{std::vector<std::uint8_t>(head + tiles * tile_bytes), {}, {}};
  w.values.resize(c.rows * c.cols);
  w.sizes.resize(c.rows * c.cols);
  const std::uint32_t shape[] = {static_cast<std::uint32_t>(c.rows), static_cast<std::uint32_t>(c.cols)};
  const std::uint8_t kinds[] = {static_cast<std::uint8_t>(c.bits), static_cast<std::uint8_t>(c.scale),
                                static_cast<std::uint8_t>(c.zero), static_cast<std::uint8_t>(c.table_bits)};
  const std::uint16_t sizes[] = {static_cast<std::uint16_t>(c.group), 16};
  const float floats[] = {c.table_bits == 0 ? -static_cast<float>(1 << (c.bits - 1)) : 0.0f, 0.5f};
  put(w.storage, 0, "PWPACKED", 8);
  put(w.storage, 8, shape, 8);
  put(w.storage, 16, kinds, 4);
  put(w.storage, 20, sizes, 4);
  put(w.storage, 24, floats, 8);
  std::vector<float> table(values);
  for (std::size_t i = 0; i < values; ++i) {
    table[i] = c.is_whole ? 0.5f * static_cast<float>(whole(-127, 127)) : normal();
    put(w.storage, 64 + 4 * i, &table[i], 4);
  }
  const std::size_t chunk = c.group % 32 == 0 ? 32 : 16;
  const std::size_t low = c.bits == 3 ? 2 : c.bits == 5 || c.bits == 6 ? 4 : c.bits;
  for (std::size_t row = 0; row < c.rows; ++row) {
    const std::size_t tile = head + row / 16 * tile_bytes, r = row % 16;
    float scale = 0.0f, zero = 0.0f;
    for (std::size_t j = 0; j < c.cols; ++j) {
      if (j % c.group == 0) {
        const std::size_t at = j / c.group * 16 + r;
        scale = stored(c);
        put_float(w.storage, tile + code_bytes + at * float_bytes, scale, c.scale);
        zero = c.zero == ZeroKind::kInteger ? static_cast<float>(whole(0, (1 << c.bits) - 1)) : stored(c);
        const std::size_t place = tile + code_bytes + scale_bytes + at * zero_size;
        if (c.zero == ZeroKind::kInteger) w.storage[place] = static_cast<std::uint8_t>(zero);
        if (c.zero == ZeroKind::kFloat || c.zero == ZeroKind::kOffset) put_float(w.storage, place, zero, c.scale);
      }
      const int last = c.table_bits == 4 ? 15 : 255;
      const unsigned code = static_cast<unsigned>(whole(0, std::min(last, (1 << c.bits) - 1)));
      const std::size_t quad = j % chunk / 4, byte = 4 * r + j % 4;
      std::size_t at = tile + j / chunk * (chunk * 2 * c.bits), from = 0;
      for (const std::size_t bits : {low, c.bits - low}) {
        if (bits == 0) continue;
        const std::size_t shift = quad % (8 / bits) * bits;
        const unsigned part = code >> from & ((1u << bits) - 1u);
        std::uint8_t& where = w.storage[at + quad / (8 / bits) * 64 + byte];
        where = static_cast<std::uint8_t>(where | part << shift);
        at += chunk * 2 * bits;
        from += bits;
      }
      const double value = c.table_bits != 0              ? table[code]
                           : c.zero == ZeroKind::kInteger ? code
                                                          : static_cast<double>(code) + static_cast<double>(floats[0]);
      const double s = scale, z = c.zero == ZeroKind::kNone ? 0.0 : zero, u = 0.5;
      const bool is_offset = c.zero == ZeroKind::kOffset;
      w.values[row * c.cols + j] = u * (is_offset ? s * value - z : s * (value - z));
      w.sizes[row * c.cols + j] = u * (std::fabs(s * value) + std::fabs(is_offset ? z : s * z));
    }
  }
  return w;
}

bool agrees(const Case& c, const pennyweight::Kernels& table, std::size_t threads, double* worst) {
  const Weights w = pack(c);
  const pennyweight::PackedWeights parsed = pennyweight::parse_packed(w.storage.data(), w.storage.size());
  std::vector<float> x(c.tokens * c.cols), bias(c.rows), out(c.tokens * c.rows, NAN);
  for (float& b : bias) b = c.is_whole ? static_cast<float>(whole(-9, 9)) : normal();
  for (std::size_t i = 0; i < x.size(); ++i) {
    // 127 in each group makes the numbers of the group whole numbers of bytes.
    x[i] = !c.is_whole ? normal() : i % c.cols % c.group == 0 ? 127.0f : static_cast<float>(whole(-20, 20));
  }
  const bool is_exact = !c.is_whole || whole(0, 1) == 0;
  pennyweight::multiply_packed(x.data(), FloatKind::kFloat32, c.tokens, c.cols, is_exact,
                               {{&parsed, bias.data(), out.data()}}, threads, *table.packed);
  for (std::size_t t = 0; t < c.tokens; ++t) {
    for (std::size_t r = 0; r < c.rows; ++r) {
      double sum = bias[r], size = std::fabs(sum);
      for (std::size_t j = 0; j < c.cols; ++j) {
        const double number = x[t * c.cols + j];
        sum += number * w.values[r * c.cols + j];
        size += std::fabs(number) * w.sizes[r * c.cols + j];
      }
      const double error = std::fabs(out[t * c.rows + r] - sum) / size;
      if (error > *worst && !c.is_whole) *worst = error;
      if (error <= (c.is_whole ? 0.0 : kTolerance)) continue;
      std::printf(
          "%s: %zu bits, groups of %zu, table of %zu bits, scale %d, zero %d, [%zu, %zu], %zu tokens, %s: "
          "row %zu of token %zu is %.9g, not %.9g\n",
          table.name, c.bits, c.group, c.table_bits, static_cast<int>(c.scale), static_cast<int>(c.zero), c.rows,
          c.cols, c.tokens, c.is_whole ? "whole numbers" : "normal numbers", r, t,
          static_cast<double>(out[t * c.rows + r]), sum);
      return false;
    }
  }
  return true;
}

std::vector<float> normals(std::size_t count) {
  std::vector<float> x(count);
  for (float& number : x) number = normal();
  return x;
}

bool is_near(const char* what, const pennyweight::Kernels& table, const std::vector<float>& x,
             const std::vector<float>& y) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::fabs(x[i] - y[i]) <= kPartsTolerance) continue;
    std::printf("%s: %s: number %zu is %.9g, by plain loops %.9g\n", table.name, what, i, static_cast<double>(x[i]),
                static_cast<double>(y[i]));
    return false;
  }
  return true;
}

// The other parts of a model, compared with the plain loops.
bool parts_agree(const pennyweight::Kernels& table, FloatKind kind) {
  constexpr std::size_t kHeads = 5, kWidth = 48, kStride = 64, kRows = 7, kCols = 83;
  const std::vector<float> queries = normals(kHeads * kWidth), x = normals(2 * kCols), bias = normals(kRows);
  std::vector<float> keys = normals(kWidth * kStride), values = normals(kStride * kWidth),
                     weights = normals(kRows * kCols);
  if (kind == FloatKind::kBFloat16) {
    // The high halves of floats: any words but those of infinity and NaN.
    for (auto* numbers : {&keys, &values, &weights}) {
      std::vector<std::uint16_t> halves(numbers->size());
      for (std::size_t i = 0; i < halves.size(); ++i) {
        std::memcpy(&halves[i], reinterpret_cast<const char*>(&(*numbers)[i]) + 2, 2);
      }
      std::memcpy(numbers->data(), halves.data(), 2 * halves.size());
    }
  }
  bool is_right = true;
  for (const std::size_t begin : {0, 5, 37}) {
    std::vector<float> mixed[2], rows[2];
    for (int plain = 0; plain < 2; ++plain) {
      const pennyweight::PackedKernels& kernels = plain ? pennyweight::kPackedScalar : *table.packed;
      std::vector<float> scores(pennyweight::kHeadsAtOnce * kStride);
      mixed[plain].resize(kHeads * kWidth);
      rows[plain].resize(2 * kRows);
      kernels.attend({queries.data(), keys.data(), values.data(), kind, kHeads, kWidth, kStride, begin, 59, 0.2f,
                      scores.data(), mixed[plain].data()});
      kernels.multiply_dense(
          {weights.data(), kind, kRows, kCols, bias.data(), x.data(), 2, 0, kRows, rows[plain].data()});
    }
    is_right = is_near("attention", table, mixed[0], mixed[1]) && is_right;
    is_right = is_near("weights that are floats", table, rows[0], rows[1]) && is_right;
  }
  return is_right;
}

}  // namespace

int main(int count, char** names) {
  pennyweight::Kernels tables[pennyweight::kMaxInstructionSets];
  const std::size_t found = pennyweight::kernel_tables(tables);
  bool is_right = found + 1 == static_cast<std::size_t>(count);
  for (std::size_t i = 0; i < found; ++i) {
    is_right = is_right && std::string(names[i + 1]) == tables[i].name;
    double worst = 0.0;
    std::size_t cases = 0;
    for (const std::size_t bits : {2, 3, 4, 5, 6, 8}) {
      for (const std::size_t group : {16, 32, 48, 64, 96, 128}) {
        if (group % 32 != 0 && (bits == 3 || bits == 5)) continue;
        for (const std::size_t tokens : {0, 1, 2, 3, 4, 5, 7, 33}) {
          for (int kind = 0; kind < 4; ++kind) {
            const std::size_t table_bits = kind == 1 || whole(0, 2) != 0 ? 0 : bits <= 4 && whole(0, 1) ? 4 : 8;
            const Case c{static_cast<std::size_t>(whole(1, 35)),
                         3 * group - static_cast<std::size_t>(whole(0, 15)),
                         bits,
                         group,
                         tokens,
                         table_bits,
                         static_cast<FloatKind>(whole(0, 2)),
                         static_cast<ZeroKind>(kind),
                         whole(0, 1) == 0};
            is_right = agrees(c, tables[i], static_cast<std::size_t>(whole(1, 3)), &worst) && is_right;
            ++cases;
          }
        }
      }
    }
    for (const FloatKind kind : {FloatKind::kFloat32, FloatKind::kBFloat16}) {
      is_right = parts_agree(tables[i], kind) && is_right;
    }
    std::printf("%s: %zu products, errors up to %.1e of the sum of sizes\n", tables[i].name, cases, worst);
  }
  if (!is_right) std::printf("FAILED: some products are wrong, or these are not the tables that were expected\n");
  return is_right ? 0 : 1;
}
