// Products with packed weights, compiled for avx512 with VNNI.
#include "packed_lanes_avx512.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedAvx512Vnni = packed_kernels<Lanes512>();

}  // namespace pennyweight
