// u = momentum * u + g + weight_decay * w;  w -= lr * u   (nesterov: w -= lr * (g + weight_decay * w + momentum * u)).
#pragma once

#include <cstdint>

#include "jointspar/types.h"

namespace jointspar {

// One parameter tensor with its momentum and gradient: flat, in memory order, `size` elements each.
// momentum_buffer has accumulator type: float64 for float64 parameters, else float32.
struct UpdateTensor {
    void* param;
    void* momentum_buffer;
    const void* grad;  // null: a gradient of zeros
    std::int64_t size;
    DType param_dtype;
    DType grad_dtype;
    double lr;
    double momentum;
    double weight_decay;
};

// tensors     [num_tensors]  param and momentum_buffer are updated in place, each element read and written once
// grad_norms  [num_tensors]  float64, written: ||g|| (may be null)
// Formulas and torch.optim.SGD conventions: lr outside the velocity, dampening 0.
void sgd_update_cpu(const UpdateTensor* tensors, std::int64_t num_tensors, bool nesterov, double* grad_norms);

}  // namespace jointspar
