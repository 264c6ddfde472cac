#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/bandit_math.h"
#include "common/philox.h"
#include "jointspar/sample_layers.h"

namespace jointspar {
namespace {

constexpr std::int64_t kMaxLayers = std::int64_t{1} << 32;       // a layer is one counter word
constexpr std::uint32_t kMaxWorldSize = std::uint32_t{1} << 24;  // see rotated_offset

struct Stream {
    std::uint64_t seed;
    std::uint32_t step;
    std::uint32_t rank;  // kAllRanks where the draw is common to all

    std::uint64_t bits(std::int64_t index, Purpose purpose) const {
        return random_bits(seed, step, rank, static_cast<std::uint32_t>(index), purpose);
    }
};

void check_arguments(const double* probabilities, std::int64_t num_layers, std::uint32_t rank,
                     std::uint32_t world_size) {
    if (num_layers < 0 || num_layers > kMaxLayers) throw std::invalid_argument("probabilities has too many layers");
    if (world_size < 1 || world_size > kMaxWorldSize) throw std::invalid_argument("world_size must be in [1, 2^24]");
    if (rank >= world_size) throw std::invalid_argument("rank must be below world_size");
    for (std::int64_t d = 0; d < num_layers; ++d) {
        if (!(probabilities[d] >= 0.0 && probabilities[d] <= 1.0)) {
            throw std::invalid_argument("probabilities[" + std::to_string(d) + "] must be in [0, 1]");
        }
    }
}

// rint(p * 2^40): the product only moves the exponent, so this rounds once.
std::uint64_t fixed_probability(double p) {
    return static_cast<std::uint64_t>(std::rint(p * static_cast<double>(kFixedOne)));
}

// pi(rank): the place of this rank among all when sorted by (random key, rank).
std::uint32_t rank_position(const Stream& common, std::uint32_t rank, std::uint32_t world_size) {
    const std::uint64_t own_key = common.bits(rank, Purpose::kRankOrder);
    std::uint32_t position = 0;
    for (std::uint32_t other = 0; other < world_size; ++other) {
        const std::uint64_t key = common.bits(other, Purpose::kRankOrder);
        position += key < own_key || (key == own_key && other < rank);
    }
    return position;
}

std::vector<std::pair<std::uint64_t, std::int64_t>> random_layer_order(const Stream& stream, std::int64_t num_layers) {
    std::vector<std::pair<std::uint64_t, std::int64_t>> order(static_cast<std::size_t>(num_layers));
    for (std::int64_t d = 0; d < num_layers; ++d) {
        order[static_cast<std::size_t>(d)] = {stream.bits(d, Purpose::kLayerOrder), d};
    }
    std::sort(order.begin(), order.end());
    return order;
}

// Walks the layers in random order and takes each one in whose stretch of the running sum offset + sum crosses an
// integer. Only the fraction is kept, which cannot overflow: p <= 1 crosses at most once.
void draw_systematic(const double* probabilities, std::int64_t num_layers, const Stream& stream, std::uint64_t offset,
                     std::uint8_t* active) {
    std::uint64_t fraction = offset;
    for (const auto& [key, d] : random_layer_order(stream, num_layers)) {
        fraction += fixed_probability(probabilities[d]);
        active[d] = fraction >= kFixedOne;
        fraction &= kFixedOne - 1;
    }
}

void draw_bernoulli(const double* probabilities, std::int64_t num_layers, const Stream& stream, std::uint8_t* active) {
    for (std::int64_t d = 0; d < num_layers; ++d) {
        active[d] = float_uniform(stream.bits(d, Purpose::kBernoulli)) < probabilities[d];
    }
}

// Layers are independent of each other; for each one the ranks share a uniform, rotated by pi(rank) / world_size, so
// that floor or ceil of world_size * p of them take it.
void draw_stratified_bernoulli(const double* probabilities, std::int64_t num_layers, const Stream& common,
                               std::uint32_t position, std::uint32_t world_size, std::uint8_t* active) {
    for (std::int64_t d = 0; d < num_layers; ++d) {
        const std::uint64_t uniform = fixed_uniform(common.bits(d, Purpose::kBernoulli));
        active[d] = rotated_offset(uniform, position, world_size) < fixed_probability(probabilities[d]);
    }
}

}  // namespace

void sample_layers_cpu(const double* probabilities, std::int64_t num_layers, std::uint64_t seed, std::uint32_t step,
                       std::uint32_t rank, std::uint32_t world_size, Strategy strategy, Draw draw,
                       std::uint8_t* active) {
    check_arguments(probabilities, num_layers, rank, world_size);
    const Stream stream{seed, step, strategy == Strategy::kIndependent ? rank : kAllRanks};
    const bool stratified = strategy == Strategy::kStratified;
    const std::uint32_t position = stratified ? rank_position(stream, rank, world_size) : 0;
    if (draw == Draw::kSystematic) {
        const std::uint64_t common_offset = fixed_uniform(stream.bits(0, Purpose::kOffset));
        const std::uint64_t offset = rotated_offset(common_offset, position, world_size);
        draw_systematic(probabilities, num_layers, stream, offset, active);
    } else if (stratified) {
        draw_stratified_bernoulli(probabilities, num_layers, stream, position, world_size, active);
    } else {
        draw_bernoulli(probabilities, num_layers, stream, active);
    }
}

}  // namespace jointspar
