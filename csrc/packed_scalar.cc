// Products with packed weights, compiled for any processor.
#include "packed_lanes_scalar.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedScalar = packed_kernels<PlainLanes>();

}  // namespace pennyweight
