// Layer-wise adaptive rate scaling (You et al. 2017), per tensor, torch conventions (lr outside the velocity):
//   local = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps);  1 where ||w|| = 0, ||g|| = 0 or !adapt
//   d = local * (g + weight_decay * w);  u = momentum * u + d;  w -= lr * u    (nesterov: w -= lr * (d + momentum * u))
#pragma once

#include "jointspar/sgd_update.h"
#include "jointspar/types.h"

namespace jointspar {

struct LarsTensor {
    UpdateTensor update;
    double trust_coefficient;
    double eps;
    bool adapt;
};

struct LarsOptions {
    bool nesterov;
    bool skip_nonfinite;  // where any ||g|| is not finite, params and momenta are not written
};

// tensors            [num_tensors]  param and momentum_buffer are updated in place
// param_norms        [num_tensors]  ||w|| before the update; NaN, or a null array: measured (one more read pass over w)
// grad_norms         [num_tensors]  ||g||; NaN, or a null array: measured (one more read pass over g)
// used_grad_norms    [num_tensors]  written: the ||g|| that was used
// param_norms_after  [num_tensors]  written: ||w|| after the update, accumulated while w is written; where the update
//                                   was skipped, ||w|| before it
// The written arrays may be the read ones. Norms are the same bits for every number of threads.
void lars_update_cpu(const LarsTensor* tensors, int64_t num_tensors, const LarsOptions& options,
                     const double* param_norms, const double* grad_norms, double* used_grad_norms,
                     double* param_norms_after);

// The same on a CUDA device. tensors is host memory, read before the call returns; all that it points to, and the four
// arrays of norms, is device memory.
void lars_update_cuda(const LarsTensor* tensors, int64_t num_tensors, const LarsOptions& options,
                      const double* param_norms, const double* grad_norms, double* used_grad_norms,
                      double* param_norms_after, const DeviceQueue& queue);

}  // namespace jointspar
