// The kernels compiled for avx512; see the headers for each.
#include "encode_groups.h"
#include "round_block.h"
#include "search_groups.h"
#include "search_nested.h"

namespace pennyweight {

const Kernels kAvx512Kernels = {"avx512",      range_groups, encode_groups, pack_nibbles, search_groups,
                                search_nested, round_block,  nullptr,       nullptr,      nullptr};

}  // namespace pennyweight
