// The kernels compiled for any processor; see round_block.h and search_groups.h.
#include "round_block.h"
#include "search_groups.h"

namespace pennyweight {

const Kernels kScalarKernels = {"scalar", search_groups, round_block};

}  // namespace pennyweight
