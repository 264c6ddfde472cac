// Draws the active layers of one rank with Philox4x32-10: counter = (step, rank, layer, purpose), key = seed.
#pragma once

#include <cstdint>

namespace jointspar {

enum class Strategy : std::int32_t { kIndependent = 0, kStratified = 1, kShared = 2 };
enum class Draw : std::int32_t { kBernoulli = 0, kSystematic = 1 };

// probabilities  [num_layers] float64 in [0, 1];  active [num_layers], written 0 or 1
// Every draw has marginals P(active[d]) = probabilities[d]. A draw depends on the arguments alone.
void sample_layers_cpu(const double* probabilities, std::int64_t num_layers, std::uint64_t seed, std::uint32_t step,
                       std::uint32_t rank, std::uint32_t world_size, Strategy strategy, Draw draw,
                       std::uint8_t* active);

}  // namespace jointspar
