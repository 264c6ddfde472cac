#include "common/argument_checks.h"
#include "cuda/launch.cuh"
#include "cuda/update_probabilities_kernel.cuh"
#include "jointspar/update_probabilities.h"

namespace jointspar {

void update_probabilities_cuda(const double* probabilities, const double* drawn_probabilities,
                               const double* squared_norms, const uint8_t* active, int64_t num_layers,
                               double* gradient_bound, const BanditParams& params, double* updated_probabilities,
                               const DeviceQueue& queue) {
    check_bandit_lr(params.bandit_lr);
    check_budget(num_layers, params.budget, params.p_min);
    const DeviceGuard guard(queue);
    const RelaxedCapture relaxed;
    launch("update_probabilities_kernel", &update_probabilities_kernel, {1, projection_threads(num_layers)}, queue,
           probabilities, drawn_probabilities, squared_norms, active, num_layers, gradient_bound, params.budget,
           params.p_min, params.bandit_lr, params.shift, updated_probabilities);
}

}  // namespace jointspar
