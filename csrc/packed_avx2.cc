// Products with packed weights, compiled for avx2.
#include "packed_lanes_avx2.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedAvx2 = packed_kernels<Lanes256>();

}  // namespace pennyweight
