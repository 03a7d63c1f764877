// Products with packed weights, compiled for any processor.
#include "packed_lanes_scalar.h"
#include "token_ops.h"

namespace pennyweight {

const PackedKernels kPackedScalar = {PlainLanes::kLargestBlock,
                                     round_tokens,
                                     multiply_tiles<PlainLanes>,
                                     read_bytes<PlainLanes>,
                                     normalize,
                                     rotate,
                                     gate_by,
                                     attend<PlainLanes>,
                                     multiply_dense<PlainLanes>};

}  // namespace pennyweight
