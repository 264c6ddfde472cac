// Algorithm 1 of Liu & Mozafari 2022: one exponentiated-gradient step on the sampling distribution, then the
// projection.
#pragma once

#include "jointspar/types.h"

namespace jointspar {

struct BanditParams {
    double budget;
    double p_min;
    double bandit_lr;
    bool shift;  // the paper's loss, shifted by L^2 / p_min^2 to be non-negative; default leaves it out
};

// probabilities         [num_layers] float64: p_t
// drawn_probabilities   [num_layers] float64: the p that `active` was drawn from (= probabilities without lag)
// squared_norms         [num_layers] float64: ||g_d||^2 unscaled; read where active
// active                [num_layers] 0 or 1
// gradient_bound        L (not squared) before the step; returns L after it
// updated_probabilities [num_layers] written; may be the same memory as `probabilities`
// L^2 <- max(0.99 L^2, max over active of n2) first. L = 0 or nothing active: probabilities are copied unchanged.
// Non-finite squared norms of active layers: std::invalid_argument, nothing written.
double update_probabilities_cpu(const double* probabilities, const double* drawn_probabilities,
                                const double* squared_norms, const uint8_t* active, int64_t num_layers,
                                double gradient_bound, const BanditParams& params, double* updated_probabilities);

// The same on a CUDA device; all arrays are device memory, gradient_bound [1] too, which is updated in place. Where a
// squared norm of an active layer is not finite, probabilities and bound stay as they are.
void update_probabilities_cuda(const double* probabilities, const double* drawn_probabilities,
                               const double* squared_norms, const uint8_t* active, int64_t num_layers,
                               double* gradient_bound, const BanditParams& params, double* updated_probabilities,
                               const DeviceQueue& queue);

}  // namespace jointspar
