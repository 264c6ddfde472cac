#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/argument_checks.h"
#include "common/draw_math.h"
#include "jointspar/sample_layers.h"

namespace jointspar {
namespace {

void check_probabilities(const double* probabilities, std::int64_t num_layers) {
    for (std::int64_t d = 0; d < num_layers; ++d) {
        if (!(probabilities[d] >= 0.0 && probabilities[d] <= 1.0)) {
            throw std::invalid_argument("probabilities[" + std::to_string(d) + "] must be in [0, 1]");
        }
    }
}

std::vector<std::pair<std::uint64_t, std::int64_t>> layer_order(const RandomBits& random, std::int64_t num_layers) {
    std::vector<std::pair<std::uint64_t, std::int64_t>> order(static_cast<std::size_t>(num_layers));
    for (std::int64_t d = 0; d < num_layers; ++d) order[static_cast<std::size_t>(d)] = {random.layer_key(d), d};
    std::sort(order.begin(), order.end());
    return order;
}

void draw_systematic(const double* probabilities, std::int64_t num_layers, const RandomBits& random,
                     std::uint64_t offset, std::uint8_t* active) {
    std::uint64_t sum = offset;
    for (const auto& [key, d] : layer_order(random, num_layers)) {
        const std::uint64_t fixed_p = fixed_probability(probabilities[d]);
        active[d] = crosses_integer(sum, fixed_p);
        sum += fixed_p;
    }
}

}  // namespace

void sample_layers_cpu(const double* probabilities, std::int64_t num_layers, std::uint64_t seed, std::uint32_t step,
                       std::uint32_t rank, std::uint32_t world_size, Strategy strategy, Draw draw,
                       std::uint64_t run_length, std::uint8_t* active) {
    check_draw(num_layers, rank, world_size, draw, run_length);
    check_probabilities(probabilities, num_layers);
    const RandomBits random{seed, step, strategy == Strategy::kIndependent ? rank : kAllRanks, run_length};
    const bool stratified = strategy == Strategy::kStratified;
    const std::uint32_t position = stratified ? random.num_ranks_before(rank, world_size, 0, 1) : 0;
    if (draw == Draw::kSystematic) {
        draw_systematic(probabilities, num_layers, random, random.systematic_offset(position, world_size), active);
        return;
    }
    for (std::int64_t d = 0; d < num_layers; ++d) {
        const double p = probabilities[d];
        active[d] =
            stratified ? takes_stratified_bernoulli(random, d, p, position, world_size) : takes_bernoulli(random, d, p);
    }
}

}  // namespace jointspar
