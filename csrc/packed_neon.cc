// Products with packed weights, compiled for NEON with dot products.
#include "packed_lanes_neon.h"

namespace pennyweight {

const PackedKernels kPackedNeon = {LanesNeon::kLargestBlock, round_tokens, multiply_tiles<LanesNeon>,
                                   read_bytes<LanesNeon>};

}  // namespace pennyweight
