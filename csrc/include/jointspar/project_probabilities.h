// argmin KL(q || w) over { p_min <= q_d <= 1, sum q = budget }:  q_d = clip(c * w_d, p_min, 1), solved exactly (KKT).
#pragma once

#include "jointspar/types.h"

namespace jointspar {

// log_weights [num_layers] float64, finite;  probabilities [num_layers] float64, written; may be the same memory
// Feasible: 0 < p_min <= budget / num_layers <= 1, tolerance 1e-9 * max(1, budget); else std::invalid_argument.
// |sum - budget| <= 1e-12 * max(1, budget), bounds exact. budget >= num_layers gives exact ones,
// budget <= p_min * num_layers exact p_min. O(num_layers log num_layers).
void project_probabilities_cpu(const double* log_weights, int64_t num_layers, double budget, double p_min,
                               double* probabilities);

// The same on a CUDA device; log_weights and probabilities are device memory. Where a log weight is not finite, which
// cannot be thrown without waiting, all probabilities are NaN.
void project_probabilities_cuda(const double* log_weights, int64_t num_layers, double budget, double p_min,
                                double* probabilities, const DeviceQueue& queue);

}  // namespace jointspar
