// Checks of host values that the CPU and CUDA forms of an operation share. Host only.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/portable.h"
#include "jointspar/sample_layers.h"

namespace jointspar {

inline void check_draw(int64_t num_layers, uint32_t rank, uint32_t world_size, Draw draw, uint64_t run_length) {
    constexpr int64_t kMaxLayers = int64_t{1} << 32;       // a layer is one counter word
    constexpr uint32_t kMaxWorldSize = uint32_t{1} << 24;  // see rotated_offset
    if (num_layers < 0 || num_layers > kMaxLayers) throw std::invalid_argument("probabilities has too many layers");
    if (world_size < 1 || world_size > kMaxWorldSize) throw std::invalid_argument("world_size must be in [1, 2^24]");
    if (rank >= world_size) throw std::invalid_argument("rank must be below world_size");
    if (run_length >> 32 != 0) throw std::invalid_argument("run_length must be below 2^32");
    if (draw == Draw::kBernoulli && run_length != 0) {
        throw std::invalid_argument("run_length: does not act with draw='bernoulli'; leave it out");
    }
}

// 0 < p_min <= budget / num_layers <= 1 within 1e-9 * max(1, budget)
inline void check_budget(int64_t num_layers, double budget, double p_min) {
    const double tolerance = 1e-9 * std::max(1.0, budget);
    const double count = static_cast<double>(num_layers);
    if (num_layers < 0) throw std::invalid_argument("log_weights has a negative length");
    if (!(p_min > 0.0 && p_min <= 1.0)) throw std::invalid_argument("p_min must be in (0, 1]");
    if (!std::isfinite(budget)) throw std::invalid_argument("budget must be finite");
    if (!(budget <= count + tolerance)) throw std::invalid_argument("budget must be at most the number of layers");
    if (!(budget >= p_min * count - tolerance)) {
        throw std::invalid_argument("budget must be at least p_min times the number of layers");
    }
}

inline void check_bandit_lr(double bandit_lr) {
    if (!(bandit_lr >= 0.0 && std::isfinite(bandit_lr))) {
        throw std::invalid_argument("bandit_lr must be finite and not negative");
    }
}

}  // namespace jointspar
