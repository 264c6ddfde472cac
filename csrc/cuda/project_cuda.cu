#include "common/argument_checks.h"
#include "cuda/launch.cuh"
#include "cuda/project_kernel.cuh"
#include "jointspar/project_probabilities.h"

namespace jointspar {

void project_probabilities_cuda(const double* log_weights, int64_t num_layers, double budget, double p_min,
                                double* probabilities, const DeviceQueue& queue) {
    check_budget(num_layers, budget, p_min);
    if (num_layers == 0) return;
    const DeviceGuard guard(queue);
    const RelaxedCapture relaxed;
    launch("project_probabilities_kernel", &project_probabilities_kernel, {1, projection_threads(num_layers)}, queue,
           log_weights, num_layers, budget, p_min, probabilities);
}

}  // namespace jointspar
