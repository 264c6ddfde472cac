#pragma once

#include "common/layer_table.h"

namespace jointspar {

// kChunkSize float zeros: what stands in for a chunk of a missing gradient.
inline const void* zero_chunk() {
    static float zeros[kChunkSize];
    return zeros;
}

}  // namespace jointspar
