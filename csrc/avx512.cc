// The kernels compiled for avx512; see round_block.h and search_groups.h.
#include "round_block.h"
#include "search_groups.h"

namespace pennyweight {

const Kernels kAvx512Kernels = {"avx512", search_groups, round_block};

}  // namespace pennyweight
