// Draws the active layers of one rank with Philox4x32-10: counter = (step, rank, layer, purpose), key = seed.
#pragma once

#include "jointspar/types.h"

namespace jointspar {

enum class Strategy : int32_t { kIndependent = 0, kStratified = 1, kShared = 2 };
enum class Draw : int32_t { kBernoulli = 0, kSystematic = 1 };

// probabilities  [num_layers] float64 in [0, 1];  active [num_layers], written 0 or 1
// run_length     below 2^32; 0: systematic draws walk the layers in random order; n: in their own order, shuffled only
//                within runs of n consecutive ones, the last of which may be shorter. Bernoulli draws take 0 only.
// Every draw has marginals P(active[d]) = probabilities[d]. A draw depends on the arguments alone.
void sample_layers_cpu(const double* probabilities, int64_t num_layers, uint64_t seed, uint32_t step, uint32_t rank,
                       uint32_t world_size, Strategy strategy, Draw draw, uint64_t run_length, uint8_t* active);

// The same bits on a CUDA device; probabilities and active are device memory. The values cannot be checked without
// waiting for them: a probability of 1 or more takes the layer, one that is not above 0 (or NaN) never does.
void sample_layers_cuda(const double* probabilities, int64_t num_layers, uint64_t seed, uint32_t step, uint32_t rank,
                        uint32_t world_size, Strategy strategy, Draw draw, uint64_t run_length, uint8_t* active,
                        const DeviceQueue& queue);

}  // namespace jointspar
