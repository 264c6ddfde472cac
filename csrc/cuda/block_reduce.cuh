// Reductions over one thread block in a fixed order: the same bits in every run. No host code: NVRTC reads this.
#pragma once

#include "common/device_chunks.h"

namespace jointspar {

template <class T, class Combine>
__device__ JOINTSPAR_INLINE T warp_reduce(T value, Combine combine) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
    }
    return value;
}

// Every thread of the block calls it and gets the result. `identity` pads blocks of fewer than 32 warps.
// scratch: shared memory [kWarpSize], free for other use once all threads have returned and synchronised.
template <class T, class Combine>
__device__ JOINTSPAR_INLINE T block_reduce(T value, T identity, T* scratch, Combine combine) {
    const int thread = static_cast<int>(threadIdx.x);
    const int num_warps = (static_cast<int>(blockDim.x) + kWarpSize - 1) / kWarpSize;
    value = warp_reduce(value, combine);
    __syncthreads();  // scratch may still be read from the reduction before
    if (thread % kWarpSize == 0) scratch[thread / kWarpSize] = value;
    __syncthreads();
    const int lane = thread % kWarpSize;
    return warp_reduce(lane < num_warps ? scratch[lane] : identity, combine);
}

template <class T>
__device__ JOINTSPAR_INLINE T block_sum(T value, T* scratch) {
    return block_reduce(value, T(0), scratch, [](T a, T b) { return a + b; });
}

// The same with shared memory of its own.
template <class T>
__device__ JOINTSPAR_INLINE T block_sum(T value) {
    __shared__ T scratch[kWarpSize];
    return block_sum(value, scratch);
}

}  // namespace jointspar
