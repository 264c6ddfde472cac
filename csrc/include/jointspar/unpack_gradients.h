// target[i] = packed[offset + i], or target[i] += packed[offset + i].
#pragma once

#include <cstdint>

#include "jointspar/types.h"

namespace jointspar {

// slices  [num_slices]  targets are written; they overlap neither each other nor `packed`
void unpack_gradients_cpu(const void* packed, DType packed_dtype, const UnpackSlice* slices, std::int64_t num_slices,
                          bool add);

// sum[i] += packed[i], i < size. Same dtype; 16-bit types are added in float32 and rounded to nearest even.
void add_packed_cpu(void* sum, const void* packed, DType dtype, std::int64_t size);

}  // namespace jointspar
