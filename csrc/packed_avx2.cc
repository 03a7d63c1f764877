// Products with packed weights, compiled for avx2.
#include "packed_lanes_avx2.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedAvx2 = {Lanes256::kLargestBlock,
                                   round_tokens,
                                   multiply_tiles<Lanes256>,
                                   read_bytes<Lanes256>,
                                   normalize,
                                   rotate,
                                   gate_by,
                                   attend<Lanes256>,
                                   multiply_dense<Lanes256>};

}  // namespace pennyweight
