#include "common/argument_checks.h"
#include "cuda/launch.cuh"
#include "cuda/sample_kernel.cuh"
#include "jointspar/sample_layers.h"

namespace jointspar {

void sample_layers_cuda(const double* probabilities, int64_t num_layers, uint64_t seed, uint32_t step, uint32_t rank,
                        uint32_t world_size, Strategy strategy, Draw draw, uint64_t run_length, uint8_t* active,
                        const DeviceQueue& queue) {
    check_draw(num_layers, rank, world_size, draw, run_length);
    if (num_layers == 0) return;
    const DeviceGuard guard(queue);
    const bool is_systematic = draw == Draw::kSystematic;
    const int64_t layers_per_block = is_systematic ? kDrawLayersPerBlock : kDrawThreads;
    const int64_t num_blocks = (num_layers + layers_per_block - 1) / layers_per_block;
    const uint32_t random_rank = strategy == Strategy::kIndependent ? rank : kAllRanks;
    const bool is_stratified = strategy == Strategy::kStratified;
    const auto kernel = is_systematic ? sample_systematic_kernel : sample_bernoulli_kernel;
    const RelaxedCapture relaxed;
    launch(is_systematic ? "sample_systematic_kernel" : "sample_bernoulli_kernel", kernel, {num_blocks, kDrawThreads},
           queue, probabilities, num_layers, seed, step, random_rank, run_length, is_stratified, rank, world_size,
           active);
}

}  // namespace jointspar
