// The operations as Python calls them on the arrays of one CUDA device: read and check the arguments, put the work on
// the stream, return at once. Small results are device arrays of the caller, so that nothing waits for them. device:
// CUDA device number; stream: a cudaStream_t as an integer, 0 the default stream. Argument meanings are in the contract
// headers of csrc/include/jointspar.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "read_arguments.h"

namespace jointspar {

// probabilities float64 [num_layers], active bool [num_layers], written
void sample_layers_on_device(pybind11::handle probabilities, pybind11::handle active, std::int32_t device,
                             std::uintptr_t stream, std::uint64_t seed, std::uint32_t step, std::uint32_t rank,
                             std::uint32_t world_size, const std::string& strategy, const std::string& draw,
                             const std::optional<std::uint64_t>& run_length);
// log_weights, probabilities float64 [num_layers], probabilities written
void project_probabilities_on_device(pybind11::handle log_weights, pybind11::handle probabilities, std::int32_t device,
                                     std::uintptr_t stream, double budget, double p_min);
// float64 [num_layers] but active, bool; gradient_bound float64 [1] and updated [num_layers] are written
void update_probabilities_on_device(pybind11::handle probabilities, pybind11::handle squared_norms,
                                    pybind11::handle active, pybind11::handle drawn_probabilities,
                                    pybind11::handle gradient_bound, pybind11::handle updated, std::int32_t device,
                                    std::uintptr_t stream, double budget, double p_min, double bandit_lr, bool shift);

// squared_norms float64 [num_grads], written
void pack_gradients_on_device(pybind11::handle grads, const Vector<double>& scales, const Vector<std::int64_t>& sizes,
                              pybind11::handle packed, pybind11::handle squared_norms, std::int32_t device,
                              std::uintptr_t stream);
void unpack_gradients_on_device(pybind11::handle packed, pybind11::handle outs, bool add, std::int32_t device,
                                std::uintptr_t stream);
void add_packed_on_device(pybind11::handle out, pybind11::handle packed, std::int32_t device, std::uintptr_t stream);
// squared_norms float64 [num_grads], written
void squared_norms_on_device(pybind11::handle grads, const std::optional<Vector<std::int64_t>>& sizes,
                             pybind11::handle squared_norms, std::int32_t device, std::uintptr_t stream);
// param_norms, grad_norms float64 [num_tensors] or None (measure); the other two are written
void lars_update_on_device(pybind11::handle params, pybind11::handle momenta, pybind11::handle grads,
                           const Vector<double>& hyper, const Vector<bool>& adapt, bool nesterov, bool skip_nonfinite,
                           pybind11::handle param_norms, pybind11::handle grad_norms, pybind11::handle used_grad_norms,
                           pybind11::handle param_norms_after, std::int32_t device, std::uintptr_t stream);
// grad_norms float64 [num_tensors], written
void sgd_update_on_device(pybind11::handle params, pybind11::handle momenta, pybind11::handle grads,
                          const Vector<double>& hyper, bool nesterov, bool skip_nonfinite, pybind11::handle grad_norms,
                          std::int32_t device, std::uintptr_t stream);

}  // namespace jointspar
