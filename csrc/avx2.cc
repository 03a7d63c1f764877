// The kernels compiled for avx2; see round_block.h and search_groups.h.
#include "round_block.h"
#include "search_groups.h"

namespace pennyweight {

const Kernels kAvx2Kernels = {"avx2", search_groups, round_block};

}  // namespace pennyweight
