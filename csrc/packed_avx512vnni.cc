// Products with packed weights, compiled for avx512 with VNNI.
#include "packed_lanes_avx512.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedAvx512Vnni = {Lanes512::kLargestBlock,
                                         round_tokens,
                                         multiply_tiles<Lanes512>,
                                         read_bytes<Lanes512>,
                                         normalize,
                                         rotate,
                                         gate_by,
                                         attend<Lanes512>,
                                         multiply_dense<Lanes512>};

}  // namespace pennyweight
