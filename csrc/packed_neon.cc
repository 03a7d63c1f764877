// Products with packed weights, compiled for NEON with dot products.
#include "packed_lanes_neon.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedNeon = packed_kernels<LanesNeon>();

}  // namespace pennyweight
