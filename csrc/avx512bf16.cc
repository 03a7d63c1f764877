// The kernels compiled for avx512 with products of bfloat16; see the headers for each.
#include "add_products.h"
#include "encode_groups.h"
#include "round_block.h"
#include "search_groups.h"
#include "search_nested.h"

namespace pennyweight {

const Kernels kAvx512Bf16Kernels = {"avx512bf16",  range_groups, encode_groups, pack_nibbles, search_groups,
                                    search_nested, round_block,  pair_rows,     add_products, nullptr};

}  // namespace pennyweight
