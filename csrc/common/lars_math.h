// The update formulas, written once for host and device: LARS (You et al. 2017) and SGD with momentum
// (torch.optim.SGD).
#pragma once

#include "common/portable.h"

namespace jointspar {

// trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps), and 1 where either norm is 0.
JOINTSPAR_HOST_DEVICE inline double lars_local_rate(double trust_coefficient, double weight_decay, double eps,
                                                    double param_norm, double grad_norm) {
    if (param_norm == 0.0 || grad_norm == 0.0) return 1.0;
    return trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps);
}

// A local rate as the accumulator holds it: one that overflowed would make NaN of 0 * rate.
template <class Acc>
JOINTSPAR_HOST_DEVICE inline Acc as_finite(double rate) {
    constexpr double kLargest = sizeof(Acc) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    return static_cast<Acc>(rate > kLargest ? kLargest : rate);
}

template <class Acc>
struct UpdateFactors {
    Acc lr;
    Acc momentum;
    Acc weight_decay;
    Acc local_rate;  // 1 for SGD
};

// d = local * (g + weight_decay * w);  u = momentum * u + d;  w -= lr * u    (nesterov: w -= lr * (d + momentum * u))
template <bool kNesterov, class Acc>
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE void momentum_step(Acc& param, Acc& momentum_buffer, Acc grad,
                                                          const UpdateFactors<Acc>& factors) {
    const Acc direction = factors.local_rate * (grad + factors.weight_decay * param);
    momentum_buffer = factors.momentum * momentum_buffer + direction;
    param -= factors.lr * (kNesterov ? direction + factors.momentum * momentum_buffer : momentum_buffer);
}

}  // namespace jointspar
