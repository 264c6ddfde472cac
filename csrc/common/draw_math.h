// The draw of the active layers: formulas that every device shares, so that all draw the same bits.
#pragma once

#include "common/philox.h"
#include "common/portable.h"

namespace jointspar {

// Probabilities and offsets of coordinated draws are fixed point with 40 fraction bits: exact sums, so that a layer
// with p = 1 is always taken and ties cannot be missed, which float sums do not give.
constexpr int kFractionBits = 40;
constexpr uint64_t kFixedOne = uint64_t{1} << kFractionBits;

// Top 40 of 64 random bits: uniform in [0, 1) as fixed point.
JOINTSPAR_HOST_DEVICE inline uint64_t fixed_uniform(uint64_t bits) { return bits >> (64 - kFractionBits); }

// Top 53 of 64 random bits: uniform in [0, 1) as float64.
JOINTSPAR_HOST_DEVICE inline double float_uniform(uint64_t bits) {
    return static_cast<double>(bits >> 11) * (1.0 / 9007199254740992.0);
}

// rint(p * 2^40): the product only moves the exponent, so this rounds once. Where nobody could check p: 1 and more is
// 1, and what is not above 0 (NaN too) is 0.
JOINTSPAR_HOST_DEVICE inline uint64_t fixed_probability(double p) {
    if (p >= 1.0) return kFixedOne;
    return p > 0.0 ? static_cast<uint64_t>(rint(p * static_cast<double>(kFixedOne))) : 0;
}

// (offset + floor(position * 2^40 / world_size)) mod 2^40; position < world_size <= 2^24 keeps the product in 64 bits.
JOINTSPAR_HOST_DEVICE inline uint64_t rotated_offset(uint64_t offset, uint64_t position, uint64_t world_size) {
    return (offset + (position << kFractionBits) / world_size) & (kFixedOne - 1);
}

// The order of layers and of ranks: by random key, equal keys by index.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool comes_before(uint64_t key, int64_t index, uint64_t other_key,
                                                         int64_t other_index) {
    return key < other_key || (key == other_key && index < other_index);
}

// All random bits of one draw.
struct RandomBits {
    uint64_t seed;
    uint32_t step;
    uint32_t rank;        // kAllRanks where the draw is common to all
    uint64_t run_length;  // 0, or how many consecutive layers are shuffled among themselves

    JOINTSPAR_HOST_DEVICE uint64_t at(int64_t index, Purpose purpose) const {
        return random_bits(seed, step, rank, static_cast<uint32_t>(index), purpose);
    }
    JOINTSPAR_HOST_DEVICE uint64_t layer_key(int64_t layer) const {
        const uint64_t bits = at(layer, Purpose::kLayerOrder);
        if (run_length == 0) return bits;
        return (static_cast<uint64_t>(layer) / run_length) << 32 | bits >> 32;
    }

    // How many of the ranks first, first + stride, ... come before `rank` in the random order of all ranks. With all of
    // them (0, 1): pi(rank), its position.
    JOINTSPAR_HOST_DEVICE uint32_t num_ranks_before(uint32_t rank_of_interest, uint32_t world_size, uint32_t first,
                                                    uint32_t stride) const {
        const uint64_t own_key = at(rank_of_interest, Purpose::kRankOrder);
        uint32_t count = 0;
        for (uint32_t other = first; other < world_size; other += stride) {
            count += comes_before(at(other, Purpose::kRankOrder), other, own_key, rank_of_interest);
        }
        return count;
    }

    // Where the systematic draw of the rank at `position` starts.
    JOINTSPAR_HOST_DEVICE uint64_t systematic_offset(uint32_t position, uint32_t world_size) const {
        return rotated_offset(fixed_uniform(at(0, Purpose::kOffset)), position, world_size);
    }
};

// Systematic: a layer is taken where its stretch of the running sum (offset included) crosses an integer. The whole
// part of the sum does not matter, so it may wrap at 2^64.
JOINTSPAR_HOST_DEVICE inline bool crosses_integer(uint64_t sum_before, uint64_t fixed_p) {
    return (sum_before & (kFixedOne - 1)) + fixed_p >= kFixedOne;
}

// Bernoulli: layers are independent of each other.
JOINTSPAR_HOST_DEVICE inline bool takes_bernoulli(const RandomBits& random, int64_t layer, double p) {
    return float_uniform(random.at(layer, Purpose::kBernoulli)) < p;
}

// Bernoulli in each layer, but for each one the ranks share a uniform, rotated by position / world_size, so that floor
// or ceil of world_size * p of them take it.
JOINTSPAR_HOST_DEVICE inline bool takes_stratified_bernoulli(const RandomBits& common, int64_t layer, double p,
                                                             uint32_t position, uint32_t world_size) {
    const uint64_t uniform = fixed_uniform(common.at(layer, Purpose::kBernoulli));
    return rotated_offset(uniform, position, world_size) < fixed_probability(p);
}

}  // namespace jointspar
