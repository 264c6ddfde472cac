// float16 by the processor's own conversions (F16C), where it has them: several times as fast as the portable one of
// float16.h, with the same bits. They do not fit into its loops, which are compiled for processors without them, too:
// so kernels convert a chunk to floats beside it, work on those, and convert what they wrote.
#pragma once

#include "common/float16.h"
#include "common/layer_table.h"

namespace jointspar {

// Whether `to_floats` and `to_halves` may be called.
bool has_half_conversions();

void to_floats(const Float16* halves, float* floats, int64_t size);
void to_halves(const float* floats, Float16* halves, int64_t size);

// Room for a chunk of floats, of this thread's own; two that differ in `which` (0, 1) may be in use at once.
float* staged_chunk(int which);

// The float16 chunk as floats, in staged_chunk(which).
inline const float* staged_floats(const void* halves, int64_t size, int which) {
    float* const floats = staged_chunk(which);
    to_floats(static_cast<const Float16*>(halves), floats, size);
    return floats;
}

}  // namespace jointspar
