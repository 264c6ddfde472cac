// The operations as Python calls them on host arrays: read and check the arguments, run the kernel without the GIL.
// Argument meanings are in the contract headers of csrc/include/jointspar.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "read_arguments.h"

namespace jointspar {

Vector<bool> sample_layers(const Vector<double>& probabilities, std::uint64_t seed, std::uint32_t step,
                           std::uint32_t rank, std::uint32_t world_size, const std::string& strategy,
                           const std::string& draw, const std::optional<std::uint64_t>& run_length);
Vector<double> project_probabilities(const Vector<double>& log_weights, double budget, double p_min);
pybind11::tuple update_probabilities(const Vector<double>& probabilities, const Vector<double>& squared_norms,
                                     const Vector<bool>& active, const Vector<double>& drawn_probabilities,
                                     double gradient_bound, double budget, double p_min, double bandit_lr, bool shift);

Vector<double> pack_gradients(pybind11::handle grads, const Vector<double>& scales, const Vector<std::int64_t>& sizes,
                              pybind11::handle packed);
void unpack_gradients(pybind11::handle packed, pybind11::handle outs, bool add);
void add_packed(pybind11::handle out, pybind11::handle packed);
Vector<double> squared_norms(pybind11::handle grads, const std::optional<Vector<std::int64_t>>& sizes);
pybind11::tuple lars_update(pybind11::handle params, pybind11::handle momenta, pybind11::handle grads,
                            const Vector<double>& hyper, const Vector<bool>& adapt, bool nesterov,
                            const Vector<double>& param_norms, const Vector<double>& grad_norms, bool skip_nonfinite);
Vector<double> sgd_update(pybind11::handle params, pybind11::handle momenta, pybind11::handle grads,
                          const Vector<double>& hyper, bool nesterov, bool skip_nonfinite);

}  // namespace jointspar
