// What the native part offers to module.cc: plain functions over raw pointers and sizes.
// They allocate nothing, throw nothing and start no threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace pennyweight {

// How decoded weights are rounded before the solver sees them: to the type in which scales are stored.
enum class Stored : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A table of rising values: the nearest one to x is that after the last threshold below x.
struct Table {
  const float* values;      // [count], or null where there is no table
  const float* thresholds;  // [count - 1]: the largest number that goes to the value before
  std::size_t count;
};

// A block of columns of a weight, transposed: arrays are [columns, rows], row-major, float32.
struct RoundBlock {
  float* targets;        // in: what each column should be rounded from; out: what it was, with the errors of the others
  const float* weights;  // the weights themselves
  float* values;         // out: values of the number format
  float* errors;         // out: weight - decoded weight
  const float*
      lower;  // [columns, columns], rows `lower_stride` apart: unit lower factor; the strict lower part is read
  std::size_t lower_stride;
  const float* scales;         // [groups, rows]; never zero
  const float* zeros;          // [groups, rows], or null
  const float* offsets;        // [groups, rows], or null; with neither or one of both
  const std::int64_t* groups;  // [columns]: the group of each column
  std::size_t columns;
  std::size_t rows;
  float smallest;  // of the number format
  float largest;
  Table element;  // instead of the whole numbers from `smallest` to `largest`
  Stored stored;
};

// Groups of weights whose scales (and zeros) are searched; see pennyweight.schemes.fit.
struct SearchGroups {
  const float* w;           // [groups, size]
  const float* importance;  // [importance_groups, size], repeated over the groups; or null
  float* scales;            // [groups]; in: the first candidate, out: the best
  float* zeros;             // [groups], the same; or null
  const float* factors;     // [factor_count, 1], with zeros [factor_count, 2]: of the range, tried in this order
  std::size_t factor_count;
  std::size_t groups;
  std::size_t size;
  std::size_t importance_groups;
  float smallest;  // of the number format
  float largest;
  float limit;           // largest magnitude of a scale
  float tiny;            // the scale that stands for 0, before its parent
  Table element;         // instead of the whole numbers from `smallest` to `largest`; without zeros only
  Table scale;           // instead of `stored`
  const float* parents;  // [groups]: of scales in a table; or null
  Stored stored;
};

// How scales or offsets are stored: floats, or whole numbers times a parent that so many consecutive ones share.
struct Field {
  float* values;   // [groups], out: decoded
  float* parents;  // [groups / span], out; null for floats, which count as their own parents
  Stored stored;   // of the values, or else of the parents
  float smallest;  // of the whole numbers; of floats, 0 where they have no sign
  float largest;
  float limit;         // largest magnitude of a value
  float parent_limit;  // and of a parent
  float tiny;          // the number that stands for 0: of a scale, before its parent
  float parent_tiny;   // of a parent
};

// Groups that search_nested works on side by side.
constexpr std::size_t kGroupsAtOnce = 16;

// Groups of weights whose scales have parents or which have offsets; see pennyweight.schemes.nested_twin.
struct SearchNested {
  const float* w;           // [groups, size]
  const float* importance;  // [importance_groups, size], repeated over the groups; or null
  const float* factors;     // [factor_count, 1], with offsets [factor_count, 2]: of the range
  std::size_t factor_count;
  const float* shares;  // [share_count]: of the largest number of a span, what its largest code stands for
  std::size_t share_count;
  std::size_t tried;  // parents of scales that are tried on the weights, of all whose error is estimated: 1 to 4
  float reach;        // how many codes of a scale are tried on either side
  bool is_thorough;   // whether the points of the grid are tried again on the grid of the parents
  std::size_t groups;
  std::size_t size;
  std::size_t importance_groups;
  std::size_t span;  // 1, 2, 4, 8 or 16
  float smallest;    // of the number format
  float largest;
  Table element;  // instead of the whole numbers from `smallest` to `largest`
  Field scale;
  Field offset;    // `values` null where there are none
  float* scratch;  // [2, size, 16], aligned to 64 bytes
};

// Groups of weights that are rounded to the nearest value of their grid.
struct EncodeGroups {
  const void* w;  // [groups, size], float32 or bfloat16
  bool is_bfloat16;
  const float* scales;  // [groups]; never zero
  const float* zeros;   // [groups], or null
  std::uint8_t* codes;  // [groups, size], out: value - smallest
  std::size_t groups;
  std::size_t size;
  float smallest;  // of the number format
  float largest;
};

// Columns of a panel: a pair of consecutive rows of that many columns, bfloat16, the first row in the low half of each
// word; a panel [pairs, kPanelColumns] is contiguous.
constexpr std::size_t kPanelColumns = 64;

// total += x xᵀ for the panels of x [2 * pairs, columns], tiles on and above the diagonal of panels only.
struct AddProducts {
  const std::uint32_t* panels;  // [columns / kPanelColumns, pairs, kPanelColumns]
  float* total;                 // [columns, columns]
  std::size_t columns;
  std::size_t pairs;
  std::size_t left_begin, left_end;    // panels that are rows of `total`
  std::size_t right_begin, right_end;  // panels that are its columns
};

struct Kernels {
  const char* name;
  // Smallest and largest of each group [size] of float32 or bfloat16, written to `low` and `high` [groups].
  void (*range_groups)(const void* w, bool is_bfloat16, std::size_t groups, std::size_t size, float* low, float* high);
  // The twin in torch is pennyweight.solvers.nearest._encode.
  void (*encode_groups)(const EncodeGroups& groups);
  // Two codes below 16 a byte, the first one low, for a little-endian processor; `codes` has twice as many `bytes`. The
  // twin in torch is pennyweight.kernels.packing._fold.
  void (*pack_nibbles)(const std::uint8_t* codes, std::size_t bytes, std::uint8_t* packed);
  // The search of fit_scales with its least-squares steps. The twin in torch is pennyweight.schemes.fit._search.
  void (*search_groups)(const SearchGroups& groups);
  // The search of parents, and of scales and offsets on their grid; whether a group may be of one value. The twin in
  // torch is pennyweight.schemes.nested.
  bool (*search_nested)(const SearchNested& groups);
  // GPTQ within one block, last column first: round, decode, add the error times a row of `lower` to the targets of the
  // columns still to come. The twin in torch is pennyweight.kernels.feedback._round_block.
  void (*round_block)(const RoundBlock& block);
  // A panel of x [rows, columns]; a last row without a partner is paired with zeros. Null where the processor cannot
  // multiply bfloat16.
  void (*pair_rows)(const std::uint16_t* x, std::size_t rows, std::size_t columns, std::size_t panel,
                    std::uint32_t* out);
  // Null where pair_rows is. Sums in float32. The twin in torch is pennyweight.stats.second_moment._add_products.
  void (*add_products)(const AddProducts& products);
  // Products with packed weights; set by dispatch.cc, since these have more instruction sets than the rest.
  const PackedKernels* packed;
};

// Upper bound on the names that instruction_sets() writes, and on the tables that tables() writes.
constexpr std::size_t kMaxInstructionSets = 16;

// Writes the names of the instruction sets that this processor has, of those that kernels may be built for, to
// `names` [kMaxInstructionSets]; returns how many. The strings are static.
std::size_t instruction_sets(const char** names);

// Writes the kernel tables that this processor can run, best first, to `tables` [kMaxInstructionSets]; returns how
// many.
std::size_t kernel_tables(Kernels* tables);

// What dispatch.cc chooses from; CMakeLists.txt decides which of them are built.
extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace pennyweight
