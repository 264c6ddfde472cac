// target[i] = packed[offset + i], or target[i] += packed[offset + i].
#pragma once

#include "jointspar/types.h"

namespace jointspar {

// slices  [num_slices]  targets are written; they overlap neither each other nor `packed`
void unpack_gradients_cpu(const void* packed, DType packed_dtype, const UnpackSlice* slices, int64_t num_slices,
                          bool add);

// sum[i] += packed[i], i < size. Same dtype; 16-bit types are added in float32 and rounded to nearest even.
void add_packed_cpu(void* sum, const void* packed, DType dtype, int64_t size);

// The same on a CUDA device; slices is host memory, read before the call returns.
void unpack_gradients_cuda(const void* packed, DType packed_dtype, const UnpackSlice* slices, int64_t num_slices,
                           bool add, const DeviceQueue& queue);
void add_packed_cuda(void* sum, const void* packed, DType dtype, int64_t size, const DeviceQueue& queue);

}  // namespace jointspar
