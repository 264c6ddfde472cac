// u = momentum * u + g + weight_decay * w;  w -= lr * u   (nesterov: w -= lr * (g + weight_decay * w + momentum * u)).
#pragma once

#include "jointspar/types.h"

namespace jointspar {

// tensors     [num_tensors]  param and momentum_buffer are updated in place, each element read and written once
// grad_norms  [num_tensors]  float64, written: ||g|| (may be null)
// skip_nonfinite: where any gradient holds a NaN or infinity, params and momenta are not written; one more read pass
// over the gradients.
// Formulas and torch.optim.SGD conventions: lr outside the velocity, dampening 0.
void sgd_update_cpu(const UpdateTensor* tensors, int64_t num_tensors, bool nesterov, bool skip_nonfinite,
                    double* grad_norms);

// The same on a CUDA device. tensors is host memory, read before the call returns; all that it points to, and
// grad_norms, is device memory.
void sgd_update_cuda(const UpdateTensor* tensors, int64_t num_tensors, bool nesterov, bool skip_nonfinite,
                     double* grad_norms, const DeviceQueue& queue);

}  // namespace jointspar
