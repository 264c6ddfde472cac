// The draw of the active layers. No host code: NVRTC reads this.
#pragma once

#include "common/draw_block.h"
#include "cuda/thread_block.cuh"

namespace jointspar {

// Blocks of kDrawThreads, one for every kDrawLayersPerBlock layers. random_rank, run_length: see RandomBits.
__global__ void __launch_bounds__(kDrawThreads)
    sample_systematic_kernel(const double* probabilities, int64_t num_layers, uint64_t seed, uint32_t step,
                             uint32_t random_rank, uint64_t run_length, bool is_stratified, uint32_t rank,
                             uint32_t world_size, uint8_t* active) {
    __shared__ ThreadBlock::Scratch scratch;
    __shared__ DrawTile tile;
    const ThreadBlock block(scratch);
    const RandomBits random{seed, step, random_rank, run_length};
    draw_systematic_block(block, tile, probabilities, num_layers, random, is_stratified, rank, world_size, active);
}

// Blocks of kDrawThreads, one thread per layer.
__global__ void __launch_bounds__(kDrawThreads)
    sample_bernoulli_kernel(const double* probabilities, int64_t num_layers, uint64_t seed, uint32_t step,
                            uint32_t random_rank, uint64_t run_length, bool is_stratified, uint32_t rank,
                            uint32_t world_size, uint8_t* active) {
    __shared__ ThreadBlock::Scratch scratch;
    const ThreadBlock block(scratch);
    const RandomBits random{seed, step, random_rank, run_length};
    draw_bernoulli_block(block, probabilities, num_layers, random, is_stratified, rank, world_size, active);
}

}  // namespace jointspar
