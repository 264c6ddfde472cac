#pragma once

#include "common/portable.h"
#include "jointspar/types.h"

namespace jointspar {

// The sum of squares of elements [begin, begin + size) of an array.
double norm_chunk(const void* source, DType dtype, int64_t begin, int64_t size);

}  // namespace jointspar
