// The formulas of Algorithm 1 that every device shares, written once.
#pragma once

#include "common/portable.h"

namespace jointspar {

// L after the step: L^2 <- max(0.99 L^2, largest n2). Norms, not their squares: L^2 may leave the range of float64
// where L does not.
JOINTSPAR_HOST_DEVICE inline double updated_bound(double bound, double largest_squared_norm) {
    return fmax(sqrt(0.99) * bound, sqrt(largest_squared_norm));
}

// What an active layer's n2_d = ||g_d||^2 adds to log p_d. drawn = q_d: the probability it was drawn from.
struct BanditGain {
    double bound;             // L, updated, above 0
    double mean_probability;  // s / D
    double p_min;
    double bandit_lr;
    bool shift;

    JOINTSPAR_HOST_DEVICE double operator()(double squared_norm, double drawn) const {
        const double norm_ratio = sqrt(squared_norm) / bound;  // in [0, 1]
        return shift ? shifted(norm_ratio, drawn) : unshifted(norm_ratio, drawn);
    }

  private:
    // bandit_lr * (n2_d / L^2) * (s/D)^2 / q_d^3
    JOINTSPAR_HOST_DEVICE double unshifted(double norm_ratio, double drawn) const {
        const double scaled = norm_ratio * mean_probability / drawn;
        return bandit_lr * scaled * scaled / drawn;
    }

    // The paper's: -alpha_p * loss_d / q_d with loss_d = L^2 / p_min^2 - n2_d / q_d^2. Put
    // bandit_lr = alpha_p * L^2 / p_min^2 and divide the loss by L^2 / p_min^2:
    //   -bandit_lr * (1 - (n2_d / L^2) * p_min^2 / q_d^2) / q_d,   where the bracket is in [0, 1] as q_d >= p_min.
    JOINTSPAR_HOST_DEVICE double shifted(double norm_ratio, double drawn) const {
        const double scaled = norm_ratio * p_min / drawn;
        return -bandit_lr * (1.0 - scaled * scaled) / drawn;
    }
};

}  // namespace jointspar
