// Layer-wise adaptive rate scaling (You et al. 2017), per tensor, torch conventions (lr outside the velocity):
//   local = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps);  1 where ||w|| = 0, ||g|| = 0 or !adapt
//   d = local * (g + weight_decay * w);  u = momentum * u + d;  w -= lr * u    (nesterov: w -= lr * (d + momentum * u))
#pragma once

#include <cstdint>

#include "jointspar/sgd_update.h"
#include "jointspar/types.h"

namespace jointspar {

struct LarsTensor {
    UpdateTensor update;
    double trust_coefficient;
    double eps;
    double param_norm;  // ||w|| before the update; NaN: measure it (one more read pass over w)
    double grad_norm;   // ||g||; NaN: measure it (one more read pass over g)
    bool adapt;
};

// tensors            [num_tensors]  param and momentum_buffer are updated in place
// grad_norms         [num_tensors]  float64, written: the ||g|| that was used
// param_norms_after  [num_tensors]  float64, written: ||w|| after the update, accumulated while w is written
// Norms are the same bits for every number of threads.
void lars_update_cpu(const LarsTensor* tensors, std::int64_t num_tensors, bool nesterov, double* grad_norms,
                     double* param_norms_after);

}  // namespace jointspar
