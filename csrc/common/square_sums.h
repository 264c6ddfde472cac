// When a sum of squares of floats can be believed; what NaN and infinity mean without <cmath>, which NVRTC lacks.
#pragma once

#include "common/portable.h"

namespace jointspar {

JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool is_nan(double value) { return value != value; }
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool is_finite(double value) { return value - value == 0.0; }

// Whether squares that were added in float32 lanes, the lanes in double, stayed in float32's range. A chunk's squares
// that were flushed to zero lose less than 1e-8 of the smallest sum that is trusted.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool is_trusted_sum(double sum) {
    constexpr double kSmallestTrusted = 1e-25;
    return sum >= kSmallestTrusted && is_finite(sum);
}

}  // namespace jointspar
