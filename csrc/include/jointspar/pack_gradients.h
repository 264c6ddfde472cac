// packed[offset + i] = cast(source[i] * scale), squared_norms[k] = sum_i source_k[i]^2 (before scaling), in one pass.
#pragma once

#include "jointspar/types.h"

namespace jointspar {

// slices         [num_slices]  ranges of `packed` must not overlap; sources must not overlap `packed`
// packed         one buffer of packed_dtype, written where slices say and nowhere else
// squared_norms  [num_slices]  float64, written; 0 for a null source; may be null (not wanted)
// The product is formed in float32 (float64 when source or packed is float64) and rounded to nearest even; a float64
// product reaches 16-bit types through float32, as in torch.
// squared_norms is the same bits for every number of threads.
void pack_gradients_cpu(const PackSlice* slices, int64_t num_slices, void* packed, DType packed_dtype,
                        double* squared_norms);

// The same on a CUDA device. slices is host memory, read before the call returns; sources, packed and squared_norms are
// device memory. Norms are the same bits in every run on one kind of device, not those of the CPU.
void pack_gradients_cuda(const PackSlice* slices, int64_t num_slices, void* packed, DType packed_dtype,
                         double* squared_norms, const DeviceQueue& queue);

}  // namespace jointspar
