// squared_norms[k] = sum_i source_k[i]^2.
#pragma once

#include "jointspar/types.h"

namespace jointspar {

// squared_norms  [num_slices] float64, written. NaN or Inf exactly where the source holds one: a finite float32
// source whose squares leave the float32 range is summed in float64. Same bits for every number of threads.
void squared_norms_cpu(const NormSlice* slices, int64_t num_slices, double* squared_norms);

// The same on a CUDA device. slices is host memory, read before the call returns; squared_norms is device memory.
void squared_norms_cuda(const NormSlice* slices, int64_t num_slices, double* squared_norms, const DeviceQueue& queue);

}  // namespace jointspar
