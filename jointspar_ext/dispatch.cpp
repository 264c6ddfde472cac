#include "dispatch.h"

#include <algorithm>
#include <vector>

#include "jointspar/pack_gradients.h"
#include "jointspar/project_probabilities.h"
#include "jointspar/squared_norms.h"
#include "jointspar/unpack_gradients.h"
#include "jointspar/update_probabilities.h"

namespace py = pybind11;

namespace jointspar {

Vector<bool> sample_layers(const Vector<double>& probabilities, std::uint64_t seed, std::uint32_t step,
                           std::uint32_t rank, std::uint32_t world_size, const std::string& strategy,
                           const std::string& draw, const std::optional<std::uint64_t>& run_length) {
    const std::int64_t num_layers = checked_length(probabilities, "probabilities");
    std::vector<std::uint8_t> active(static_cast<std::size_t>(num_layers));
    sample_layers_cpu(probabilities.data(), num_layers, seed, step, rank, world_size, parse_strategy(strategy),
                      parse_draw(draw), parse_run_length(run_length), active.data());
    Vector<bool> result(num_layers);
    std::copy(active.begin(), active.end(), result.mutable_data());
    return result;
}

Vector<double> project_probabilities(const Vector<double>& log_weights, double budget, double p_min) {
    const std::int64_t num_layers = checked_length(log_weights, "log_weights");
    Vector<double> probabilities(num_layers);
    project_probabilities_cpu(log_weights.data(), num_layers, budget, p_min, probabilities.mutable_data());
    return probabilities;
}

py::tuple update_probabilities(const Vector<double>& probabilities, const Vector<double>& squared_norms,
                               const Vector<bool>& active, const Vector<double>& drawn_probabilities,
                               double gradient_bound, double budget, double p_min, double bandit_lr, bool shift) {
    const std::int64_t num_layers = checked_length(probabilities, "probabilities");
    check_length(squared_norms, "squared_norms", num_layers);
    check_length(active, "active", num_layers);
    check_length(drawn_probabilities, "drawn_probabilities", num_layers);
    const std::vector<std::uint8_t> is_active(active.data(), active.data() + num_layers);
    Vector<double> updated(num_layers);
    const double bound = update_probabilities_cpu(probabilities.data(), drawn_probabilities.data(),
                                                  squared_norms.data(), is_active.data(), num_layers, gradient_bound,
                                                  {budget, p_min, bandit_lr, shift}, updated.mutable_data());
    return py::make_tuple(updated, bound);
}

Vector<double> pack_gradients(py::handle grads, const Vector<double>& scales, const Vector<std::int64_t>& sizes,
                              py::handle packed) {
    ArrayReader reader;
    const PackRequest request = read_pack(reader, grads, scales, sizes, packed);
    const std::int64_t count = as_int64(request.slices.size());
    Vector<double> norms(count);
    double* const norms_data = norms.mutable_data();
    {
        const py::gil_scoped_release release;
        pack_gradients_cpu(request.slices.data(), count, request.packed.data, request.packed.dtype, norms_data);
    }
    return norms;
}

void unpack_gradients(py::handle packed, py::handle outs, bool add) {
    ArrayReader reader;
    const UnpackRequest request = read_unpack(reader, packed, outs);
    const py::gil_scoped_release release;
    unpack_gradients_cpu(request.packed.data, request.packed.dtype, request.slices.data(),
                         as_int64(request.slices.size()), add);
}

void add_packed(py::handle out, py::handle packed) {
    ArrayReader reader;
    const AddRequest request = read_add(reader, out, packed);
    const py::gil_scoped_release release;
    add_packed_cpu(request.sum.data, request.addend.data, request.sum.dtype, request.sum.size);
}

Vector<double> squared_norms(py::handle grads, const std::optional<Vector<std::int64_t>>& sizes) {
    ArrayReader reader;
    const std::vector<NormSlice> slices = read_norm_slices(reader, grads, sizes);
    Vector<double> norms(as_int64(slices.size()));
    double* const norms_data = norms.mutable_data();
    {
        const py::gil_scoped_release release;
        squared_norms_cpu(slices.data(), as_int64(slices.size()), norms_data);
    }
    return norms;
}

py::tuple lars_update(py::handle params, py::handle momenta, py::handle grads, const Vector<double>& hyper,
                      const Vector<bool>& adapt, bool nesterov, const Vector<double>& param_norms,
                      const Vector<double>& grad_norms, bool skip_nonfinite) {
    ArrayReader reader;
    const std::vector<LarsTensor> tensors = read_lars_tensors(reader, params, momenta, grads, hyper, adapt);
    const std::int64_t count = as_int64(tensors.size());
    check_length(param_norms, "param_norms", count);
    check_length(grad_norms, "grad_norms", count);
    Vector<double> used_grad_norms(count);
    Vector<double> norms_after(count);
    double* const used_data = used_grad_norms.mutable_data();
    double* const after_data = norms_after.mutable_data();
    const double* const known_param_norms = param_norms.data();
    const double* const known_grad_norms = grad_norms.data();
    {
        const py::gil_scoped_release release;
        lars_update_cpu(tensors.data(), count, {nesterov, skip_nonfinite}, known_param_norms, known_grad_norms,
                        used_data, after_data);
    }
    return py::make_tuple(used_grad_norms, norms_after);
}

Vector<double> sgd_update(py::handle params, py::handle momenta, py::handle grads, const Vector<double>& hyper,
                          bool nesterov, bool skip_nonfinite) {
    ArrayReader reader;
    const std::vector<UpdateTensor> tensors = read_sgd_tensors(reader, params, momenta, grads, hyper);
    const std::int64_t count = as_int64(tensors.size());
    Vector<double> grad_norms(count);
    double* const norms_data = grad_norms.mutable_data();
    {
        const py::gil_scoped_release release;
        sgd_update_cpu(tensors.data(), count, nesterov, skip_nonfinite, norms_data);
    }
    return grad_norms;
}

}  // namespace jointspar
