// Whether an update is to be skipped: found by the launch that measures, read by the launch that updates.
#pragma once

#include "common/portable.h"

namespace jointspar {

// Device memory, zero before the first launch; every measuring launch leaves the two counts at zero.
struct SkipState {
    uint32_t num_finished;   // slices
    uint32_t num_nonfinite;  // of them
    uint32_t is_skipped;     // of the last launch
    uint32_t unused;
};

}  // namespace jointspar
