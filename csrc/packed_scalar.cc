// Products with packed weights, compiled for any processor.
#include "packed_lanes_scalar.h"

namespace pennyweight {

const PackedKernels kPackedScalar = {PlainLanes::kLargestBlock, round_tokens, multiply_tiles<PlainLanes>,
                                     read_bytes<PlainLanes>};

}  // namespace pennyweight
