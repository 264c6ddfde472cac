// The size of the one block that projects. No host code: NVRTC reads this.
#pragma once

#include "cuda/block_reduce.cuh"

namespace jointspar {

constexpr uint32_t kMaxProjectionThreads = 1024;

// As many as there are layers, in a power of two of warps.
JOINTSPAR_HOST_DEVICE constexpr uint32_t projection_threads(int64_t num_layers) {
    uint32_t num_threads = kWarpSize;
    while (num_threads < num_layers && num_threads < kMaxProjectionThreads) num_threads *= 2;
    return num_threads;
}

}  // namespace jointspar
