#include "jointspar/update_probabilities.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/argument_checks.h"
#include "common/bandit_math.h"
#include "jointspar/project_probabilities.h"

namespace jointspar {
namespace {

void check_probabilities(const char* name, const double* values, std::int64_t num_layers) {
    for (std::int64_t d = 0; d < num_layers; ++d) {
        if (!(values[d] > 0.0 && values[d] <= 1.0)) {
            throw std::invalid_argument(std::string(name) + "[" + std::to_string(d) + "] must be in (0, 1]");
        }
    }
}

void check_squared_norms(const double* squared_norms, const std::uint8_t* active, std::int64_t num_layers) {
    for (std::int64_t d = 0; d < num_layers; ++d) {
        if (active[d] && !(squared_norms[d] >= 0.0 && std::isfinite(squared_norms[d]))) {
            throw std::invalid_argument("squared_norms[" + std::to_string(d) + "] must be finite and not negative");
        }
    }
}

double largest_active(const double* squared_norms, const std::uint8_t* active, std::int64_t num_layers) {
    double largest = 0.0;
    for (std::int64_t d = 0; d < num_layers; ++d) {
        if (active[d]) largest = std::max(largest, squared_norms[d]);
    }
    return largest;
}

}  // namespace

double update_probabilities_cpu(const double* probabilities, const double* drawn_probabilities,
                                const double* squared_norms, const std::uint8_t* active, std::int64_t num_layers,
                                double gradient_bound, const BanditParams& params, double* updated_probabilities) {
    if (!(gradient_bound >= 0.0 && std::isfinite(gradient_bound))) {
        throw std::invalid_argument("gradient_bound must be finite and not negative");
    }
    check_bandit_lr(params.bandit_lr);
    check_probabilities("probabilities", probabilities, num_layers);
    check_probabilities("drawn_probabilities", drawn_probabilities, num_layers);
    check_squared_norms(squared_norms, active, num_layers);

    const double bound = updated_bound(gradient_bound, largest_active(squared_norms, active, num_layers));
    if (bound == 0.0 || std::none_of(active, active + num_layers, [](std::uint8_t is_active) { return is_active; })) {
        std::copy(probabilities, probabilities + num_layers, updated_probabilities);
        return bound;
    }
    const double mean_probability = params.budget / static_cast<double>(num_layers);
    const BanditGain gain{bound, mean_probability, params.p_min, params.bandit_lr, params.shift};
    std::vector<double> log_weights(static_cast<std::size_t>(num_layers));
    for (std::int64_t d = 0; d < num_layers; ++d) {
        log_weights[static_cast<std::size_t>(d)] =
            std::log(probabilities[d]) + (active[d] ? gain(squared_norms[d], drawn_probabilities[d]) : 0.0);
    }
    project_probabilities_cpu(log_weights.data(), num_layers, params.budget, params.p_min, updated_probabilities);
    return bound;
}

}  // namespace jointspar
