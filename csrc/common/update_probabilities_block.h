// Algorithm 1 and the projection by one block of threads, without scratch: the log weights wait in the output.
#pragma once

#include "common/bandit_math.h"
#include "common/projection_block.h"

namespace jointspar {

// What the active layers' squared norms hold.
struct ActiveNorms {
    double largest;
    int64_t num_active;
    int64_t num_invalid;  // not finite or negative

    JOINTSPAR_HOST_DEVICE static ActiveNorms combine(const ActiveNorms& a, const ActiveNorms& b) {
        return ActiveNorms{fmax(a.largest, b.largest), a.num_active + b.num_active, a.num_invalid + b.num_invalid};
    }
};

template <class Block>
JOINTSPAR_DEVICE JOINTSPAR_INLINE ActiveNorms find_active_norms(const Block& block, const double* squared_norms,
                                                                const uint8_t* active, int64_t num_layers) {
    ActiveNorms own{0.0, 0, 0};
    for (int64_t d = block.thread(); d < num_layers; d += block.num_threads()) {
        if (!active[d]) continue;
        const double squared_norm = squared_norms[d];
        const bool is_valid = squared_norm >= 0.0 && isfinite(squared_norm);
        own = ActiveNorms::combine(own, ActiveNorms{squared_norm, 1, !is_valid});
    }
    return block.reduce(own, ActiveNorms::combine);
}

// gradient_bound [1] is updated in place; updated_probabilities may be the memory of probabilities.
template <class Block>
JOINTSPAR_DEVICE JOINTSPAR_INLINE void update_probabilities_block(const Block& block, const double* probabilities,
                                                                  const double* drawn_probabilities,
                                                                  const double* squared_norms, const uint8_t* active,
                                                                  int64_t num_layers, double* gradient_bound,
                                                                  double budget, double p_min, double bandit_lr,
                                                                  bool shift, double* updated_probabilities) {
    const double bound_before = *gradient_bound;
    const ActiveNorms norms = find_active_norms(block, squared_norms, active, num_layers);  // all have read the bound
    const bool is_valid = norms.num_invalid == 0;
    const double bound = is_valid ? updated_bound(bound_before, norms.largest) : bound_before;
    if (block.thread() == 0) *gradient_bound = bound;
    const bool is_step = is_valid && norms.num_active > 0 && bound > 0.0;
    const BanditGain gain{bound, budget / static_cast<double>(num_layers), p_min, bandit_lr, shift};
    for (int64_t d = block.thread(); d < num_layers; d += block.num_threads()) {
        const double p = probabilities[d];
        const double added = is_step && active[d] ? gain(squared_norms[d], drawn_probabilities[d]) : 0.0;
        updated_probabilities[d] = is_step ? log(p) + added : p;
    }
    if (!is_step) return;
    ProjectionBlock<Block>(block, updated_probabilities, num_layers, budget, p_min).write(updated_probabilities);
}

}  // namespace jointspar
