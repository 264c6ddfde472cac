// Formulas of the sampling distribution that every device shares, written once.
#pragma once

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

// (offset + floor(position * 2^40 / world_size)) mod 2^40; position < world_size <= 2^24 keeps the product in 64 bits.
JOINTSPAR_HOST_DEVICE inline uint64_t rotated_offset(uint64_t offset, uint64_t position, uint64_t world_size) {
    return (offset + (position << kFractionBits) / world_size) & (kFixedOne - 1);
}

// What Algorithm 1 adds to log p_d of an active layer. norm_ratio = ||g_d|| / L in [0, 1], drawn = q_d, the
// probability that the layer was drawn from, mean_probability = s / D.
// Default: bandit_lr * (n2_d / L^2) * (s/D)^2 / q_d^3.
JOINTSPAR_HOST_DEVICE inline double bandit_gain(double norm_ratio, double drawn, double mean_probability,
                                                double bandit_lr) {
    const double scaled = norm_ratio * mean_probability / drawn;
    return bandit_lr * scaled * scaled / drawn;
}

// Shifted, the paper's: -alpha_p * loss_d / q_d with loss_d = L^2 / p_min^2 - n2_d / q_d^2. Put
// bandit_lr = alpha_p * L^2 / p_min^2 and divide the loss by L^2 / p_min^2:
//   -bandit_lr * (1 - (n2_d / L^2) * p_min^2 / q_d^2) / q_d,   where the bracket is in [0, 1] as q_d >= p_min.
JOINTSPAR_HOST_DEVICE inline double shifted_bandit_gain(double norm_ratio, double drawn, double p_min,
                                                        double bandit_lr) {
    const double scaled = norm_ratio * p_min / drawn;
    return -bandit_lr * (1.0 - scaled * scaled) / drawn;
}

}  // namespace jointspar
