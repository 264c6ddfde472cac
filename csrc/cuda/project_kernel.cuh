// The exact projection, in one block. No host code: NVRTC reads this.
#pragma once

#include "common/projection_block.h"
#include "cuda/projection_threads.cuh"
#include "cuda/thread_block.cuh"

namespace jointspar {

__global__ void __launch_bounds__(kMaxProjectionThreads)
    project_probabilities_kernel(const double* log_weights, int64_t num_layers, double budget, double p_min,
                                 double* probabilities) {
    __shared__ ThreadBlock::Scratch scratch;
    const ThreadBlock block(scratch);
    ProjectionBlock<ThreadBlock>(block, log_weights, num_layers, budget, p_min).write(probabilities);
}

}  // namespace jointspar
