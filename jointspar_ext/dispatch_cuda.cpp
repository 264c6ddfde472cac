#include "dispatch_cuda.h"

#include <vector>

#include "jointspar/pack_gradients.h"
#include "jointspar/project_probabilities.h"
#include "jointspar/squared_norms.h"
#include "jointspar/unpack_gradients.h"
#include "jointspar/update_probabilities.h"

namespace py = pybind11;

namespace jointspar {
namespace {

DeviceQueue queue_of(std::int32_t device, std::uintptr_t stream) {
    return {device, reinterpret_cast<void*>(stream)};  // NOLINT: Python hands streams over as integers
}

// A float64 vector in device memory; the size that an operation expects, or any where that is negative.
struct DeviceVector {
    double* data;
    std::int64_t size;
};

DeviceVector read_vector(ArrayReader& reader, py::handle object, const char* name, Access access,
                         std::int64_t size = -1) {
    const ArrayView view = reader.read_flat(object, {name}, access, size);
    if (view.dtype != DType::kFloat64) throw py::type_error(std::string(name) + " must have dtype float64");
    return {static_cast<double*>(view.data), view.size};
}

const double* read_known_norms(ArrayReader& reader, py::handle norms, const char* name, std::int64_t count) {
    return norms.is_none() ? nullptr : read_vector(reader, norms, name, Access::kRead, count).data;
}

std::uint8_t* read_flags(ArrayReader& reader, py::handle object, const char* name, Access access, std::int64_t size) {
    return static_cast<std::uint8_t*>(reader.read_flat(object, {name}, access, size, Kind::kFlag).data);
}

}  // namespace

void sample_layers_on_device(py::handle probabilities, py::handle active, std::int32_t device, std::uintptr_t stream,
                             std::uint64_t seed, std::uint32_t step, std::uint32_t rank, std::uint32_t world_size,
                             const std::string& strategy, const std::string& draw,
                             const std::optional<std::uint64_t>& run_length) {
    ArrayReader reader(device, stream);
    const DeviceVector p = read_vector(reader, probabilities, "probabilities", Access::kRead);
    std::uint8_t* const is_active = read_flags(reader, active, "active", Access::kWrite, p.size);
    reader.check_no_overlap();
    sample_layers_cuda(p.data, p.size, seed, step, rank, world_size, parse_strategy(strategy), parse_draw(draw),
                       parse_run_length(run_length), is_active, queue_of(device, stream));
}

void project_probabilities_on_device(py::handle log_weights, py::handle probabilities, std::int32_t device,
                                     std::uintptr_t stream, double budget, double p_min) {
    ArrayReader reader(device, stream);
    const DeviceVector log_w = read_vector(reader, log_weights, "log_weights", Access::kRead);
    const DeviceVector q = read_vector(reader, probabilities, "probabilities", Access::kWrite, log_w.size);
    reader.check_no_overlap();
    project_probabilities_cuda(log_w.data, log_w.size, budget, p_min, q.data, queue_of(device, stream));
}

void update_probabilities_on_device(py::handle probabilities, py::handle squared_norms, py::handle active,
                                    py::handle drawn_probabilities, py::handle gradient_bound, py::handle updated,
                                    std::int32_t device, std::uintptr_t stream, double budget, double p_min,
                                    double bandit_lr, bool shift) {
    ArrayReader reader(device, stream);
    const DeviceVector p = read_vector(reader, probabilities, "probabilities", Access::kRead);
    const DeviceVector n2 = read_vector(reader, squared_norms, "squared_norms", Access::kRead, p.size);
    const std::uint8_t* const is_active = read_flags(reader, active, "active", Access::kRead, p.size);
    const DeviceVector drawn = read_vector(reader, drawn_probabilities, "drawn_probabilities", Access::kRead, p.size);
    const DeviceVector bound = read_vector(reader, gradient_bound, "gradient_bound", Access::kWrite, 1);
    const DeviceVector q = read_vector(reader, updated, "updated", Access::kWrite, p.size);
    reader.check_no_overlap();
    update_probabilities_cuda(p.data, drawn.data, n2.data, is_active, p.size, bound.data,
                              {budget, p_min, bandit_lr, shift}, q.data, queue_of(device, stream));
}

void pack_gradients_on_device(py::handle grads, const Vector<double>& scales, const Vector<std::int64_t>& sizes,
                              py::handle packed, py::handle squared_norms, std::int32_t device, std::uintptr_t stream) {
    ArrayReader reader(device, stream);
    const PackRequest request = read_pack(reader, grads, scales, sizes, packed);
    const std::int64_t count = as_int64(request.slices.size());
    const DeviceVector norms = read_vector(reader, squared_norms, "squared_norms", Access::kWrite, count);
    reader.check_no_overlap();
    pack_gradients_cuda(request.slices.data(), count, request.packed.data, request.packed.dtype, norms.data,
                        queue_of(device, stream));
}

void unpack_gradients_on_device(py::handle packed, py::handle outs, bool add, std::int32_t device,
                                std::uintptr_t stream) {
    ArrayReader reader(device, stream);
    const UnpackRequest request = read_unpack(reader, packed, outs);
    unpack_gradients_cuda(request.packed.data, request.packed.dtype, request.slices.data(),
                          as_int64(request.slices.size()), add, queue_of(device, stream));
}

void add_packed_on_device(py::handle out, py::handle packed, std::int32_t device, std::uintptr_t stream) {
    ArrayReader reader(device, stream);
    const AddRequest request = read_add(reader, out, packed);
    add_packed_cuda(request.sum.data, request.addend.data, request.sum.dtype, request.sum.size,
                    queue_of(device, stream));
}

void squared_norms_on_device(py::handle grads, const std::optional<Vector<std::int64_t>>& sizes,
                             py::handle squared_norms, std::int32_t device, std::uintptr_t stream) {
    ArrayReader reader(device, stream);
    const std::vector<NormSlice> slices = read_norm_slices(reader, grads, sizes);
    const std::int64_t count = as_int64(slices.size());
    const DeviceVector norms = read_vector(reader, squared_norms, "squared_norms", Access::kWrite, count);
    reader.check_no_overlap();
    squared_norms_cuda(slices.data(), count, norms.data, queue_of(device, stream));
}

void lars_update_on_device(py::handle params, py::handle momenta, py::handle grads, const Vector<double>& hyper,
                           const Vector<bool>& adapt, bool nesterov, bool skip_nonfinite, py::handle param_norms,
                           py::handle grad_norms, py::handle used_grad_norms, py::handle param_norms_after,
                           std::int32_t device, std::uintptr_t stream) {
    ArrayReader reader(device, stream);
    const std::vector<LarsTensor> tensors = read_lars_tensors(reader, params, momenta, grads, hyper, adapt);
    const std::int64_t count = as_int64(tensors.size());
    const double* const known_param_norms = read_known_norms(reader, param_norms, "param_norms", count);
    const double* const known_grad_norms = read_known_norms(reader, grad_norms, "grad_norms", count);
    const DeviceVector used = read_vector(reader, used_grad_norms, "used_grad_norms", Access::kWrite, count);
    const DeviceVector after = read_vector(reader, param_norms_after, "param_norms_after", Access::kWrite, count);
    reader.check_no_overlap();
    lars_update_cuda(tensors.data(), count, {nesterov, skip_nonfinite}, known_param_norms, known_grad_norms, used.data,
                     after.data, queue_of(device, stream));
}

void sgd_update_on_device(py::handle params, py::handle momenta, py::handle grads, const Vector<double>& hyper,
                          bool nesterov, bool skip_nonfinite, py::handle grad_norms, std::int32_t device,
                          std::uintptr_t stream) {
    ArrayReader reader(device, stream);
    const std::vector<UpdateTensor> tensors = read_sgd_tensors(reader, params, momenta, grads, hyper);
    const std::int64_t count = as_int64(tensors.size());
    const DeviceVector norms = read_vector(reader, grad_norms, "grad_norms", Access::kWrite, count);
    reader.check_no_overlap();
    sgd_update_cuda(tensors.data(), count, nesterov, skip_nonfinite, norms.data, queue_of(device, stream));
}

}  // namespace jointspar
