// Algorithm 1 and the projection, in one block. No host code: NVRTC reads this.
#pragma once

#include "common/update_probabilities_block.h"
#include "cuda/projection_threads.cuh"
#include "cuda/thread_block.cuh"

namespace jointspar {

__global__ void __launch_bounds__(kMaxProjectionThreads)
    update_probabilities_kernel(const double* probabilities, const double* drawn_probabilities,
                                const double* squared_norms, const uint8_t* active, int64_t num_layers,
                                double* gradient_bound, double budget, double p_min, double bandit_lr, bool shift,
                                double* updated_probabilities) {
    __shared__ ThreadBlock::Scratch scratch;
    const ThreadBlock block(scratch);
    update_probabilities_block(block, probabilities, drawn_probabilities, squared_norms, active, num_layers,
                               gradient_bound, budget, p_min, bandit_lr, shift, updated_probabilities);
}

}  // namespace jointspar
