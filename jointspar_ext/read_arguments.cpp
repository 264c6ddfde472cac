#include "read_arguments.h"

#include <limits>
#include <utility>

namespace py = pybind11;

namespace jointspar {
namespace {

template <class T>
std::int64_t check_same_count(const std::vector<T>& list, const char* name, std::int64_t count) {
    if (as_int64(list.size()) == count) return count;
    throw py::value_error(std::string(name) + " must have " + std::to_string(count) + " arrays, not " +
                          std::to_string(list.size()));
}

// Where slices that follow one another without padding begin; one more entry holds the total.
std::vector<std::int64_t> offsets_of(const std::int64_t* sizes, std::int64_t count) {
    std::vector<std::int64_t> offsets{0};
    offsets.reserve(static_cast<std::size_t>(count) + 1);
    for (std::int64_t k = 0; k < count; ++k) {
        if (sizes[k] < 0 || sizes[k] > std::numeric_limits<std::int64_t>::max() - offsets.back()) {
            throw py::value_error("sizes[" + std::to_string(k) + "] is negative or too large");
        }
        offsets.push_back(offsets.back() + sizes[k]);
    }
    return offsets;
}

const void* element(const ArrayView& array, std::int64_t index) {
    if (array.data == nullptr) return nullptr;
    return static_cast<const std::byte*>(array.data) + index * element_bytes(array.dtype);
}

bool is_list(py::handle object) { return PyList_Check(object.ptr()) != 0 || PyTuple_Check(object.ptr()) != 0; }

template <class Enum>
Enum parse(const char* name, const std::string& value, std::initializer_list<std::pair<const char*, Enum>> choices) {
    std::string names;
    for (const auto& [choice, result] : choices) {
        if (value == choice) return result;
        names += (names.empty() ? "" : ", ") + std::string(choice);
    }
    throw py::value_error(std::string(name) + " must be one of " + names + ", not '" + value + "'");
}

// Fills in gradients, from a list (None: zeros) or from one packed buffer in the order of the parameters.
void read_grads(ArrayReader& reader, py::handle grads, const std::vector<ArrayView>& params,
                std::vector<UpdateTensor>& tensors) {
    const std::int64_t count = as_int64(params.size());
    if (is_list(grads)) {
        const std::vector<ArrayView> views = reader.read_list(grads, "grads", Access::kRead, true);
        check_same_count(views, "grads", count);
        for (std::size_t k = 0; k < views.size(); ++k) {
            if (views[k].is_none) continue;
            check_same_layout(views[k], {"grads", as_int64(k)}, params[k], {"params", as_int64(k)});
            tensors[k].grad = views[k].data;
            tensors[k].grad_dtype = views[k].dtype;
        }
        return;
    }
    const ArrayView packed = reader.read_flat(grads, {"grads"}, Access::kRead);
    std::int64_t offset = 0;
    for (UpdateTensor& tensor : tensors) offset += tensor.size;
    check_packed_size(packed, "grads", offset);
    offset = 0;
    for (UpdateTensor& tensor : tensors) {
        tensor.grad = element(packed, offset);
        tensor.grad_dtype = packed.dtype;
        offset += tensor.size;
    }
}

// `hyper` [count, num_columns] starts with the columns lr, momentum, weight_decay.
std::vector<UpdateTensor> read_update(ArrayReader& reader, py::handle params, py::handle momenta, py::handle grads,
                                      const Vector<double>& hyper, std::int64_t num_columns) {
    const std::vector<ArrayView> param_views = reader.read_list(params, "params", Access::kWrite);
    const std::vector<ArrayView> momentum_views = reader.read_list(momenta, "momenta", Access::kWrite);
    const std::int64_t count = check_same_count(momentum_views, "momenta", as_int64(param_views.size()));
    if (hyper.ndim() != 2 || hyper.shape(0) != count || hyper.shape(1) != num_columns) {
        throw py::value_error("hyper must have shape [" + std::to_string(count) + ", " + std::to_string(num_columns) +
                              "]");
    }
    std::vector<UpdateTensor> tensors;
    tensors.reserve(param_views.size());
    for (std::size_t k = 0; k < param_views.size(); ++k) {
        const ArrayView& param = param_views[k];
        const ArrayView& momentum_buffer = momentum_views[k];
        const ArgName name{"momenta", as_int64(k)};
        check_same_layout(momentum_buffer, name, param, {"params", as_int64(k)});
        const bool is_double = param.dtype == DType::kFloat64;
        if (momentum_buffer.dtype != (is_double ? DType::kFloat64 : DType::kFloat32)) {
            throw py::type_error(
                name.str() + (is_double ? " must have dtype float64, as its parameter" : " must have dtype float32"));
        }
        const double* factors = hyper.data(as_int64(k), 0);
        tensors.push_back({param.data, momentum_buffer.data, nullptr, param.size, param.dtype, DType::kFloat32,
                           factors[0], factors[1], factors[2]});
    }
    read_grads(reader, grads, param_views, tensors);
    reader.check_no_overlap();
    return tensors;
}

}  // namespace

void check_packed_size(const ArrayView& packed, const char* name, std::int64_t total) {
    if (packed.size == total) return;
    throw py::value_error(std::string(name) + " has " + std::to_string(packed.size) + " elements; its slices have " +
                          std::to_string(total) + " together");
}

Strategy parse_strategy(const std::string& strategy) {
    return parse<Strategy>("strategy", strategy,
                           {{"independent", Strategy::kIndependent},
                            {"stratified", Strategy::kStratified},
                            {"shared", Strategy::kShared}});
}

Draw parse_draw(const std::string& draw) {
    return parse<Draw>("draw", draw, {{"bernoulli", Draw::kBernoulli}, {"systematic", Draw::kSystematic}});
}

std::uint64_t parse_run_length(const std::optional<std::uint64_t>& run_length) {
    if (run_length == 0) throw py::value_error("run_length must be at least 1");
    return run_length.value_or(0);
}

PackRequest read_pack(ArrayReader& reader, py::handle grads, const Vector<double>& scales,
                      const Vector<std::int64_t>& sizes, py::handle packed) {
    const std::vector<ArrayView> views = reader.read_list(grads, "grads", Access::kRead, true);
    const std::int64_t count = as_int64(views.size());
    check_length(scales, "scales", count);
    check_length(sizes, "sizes", count);
    const std::vector<std::int64_t> offsets = offsets_of(sizes.data(), count);
    PackRequest request{{}, reader.read_flat(packed, {"out"}, Access::kWrite)};
    check_packed_size(request.packed, "out", offsets.back());
    reader.check_no_overlap();
    request.slices.reserve(views.size());
    for (std::size_t k = 0; k < views.size(); ++k) {
        const std::int64_t size = sizes.data()[k];
        if (!views[k].is_none && views[k].size != size) {
            throw py::value_error(ArgName{"grads", as_int64(k)}.str() + " has " + std::to_string(views[k].size) +
                                  " elements, sizes says " + std::to_string(size));
        }
        request.slices.push_back({views[k].data, views[k].dtype, offsets[k], size, scales.data()[k]});
    }
    return request;
}

UnpackRequest read_unpack(ArrayReader& reader, py::handle packed, py::handle outs) {
    UnpackRequest request{reader.read_flat(packed, {"packed"}, Access::kRead), {}};
    const std::vector<ArrayView> targets = reader.read_list(outs, "outs", Access::kWrite);
    reader.check_no_overlap();
    request.slices.reserve(targets.size());
    std::int64_t offset = 0;
    for (const ArrayView& target : targets) {
        request.slices.push_back({target.data, target.dtype, offset, target.size});
        offset += target.size;
    }
    check_packed_size(request.packed, "packed", offset);
    return request;
}

AddRequest read_add(ArrayReader& reader, py::handle out, py::handle packed) {
    const AddRequest request{reader.read_flat(out, {"out"}, Access::kWrite),
                             reader.read_flat(packed, {"packed"}, Access::kRead)};
    reader.check_no_overlap();
    if (request.sum.dtype != request.addend.dtype) throw py::type_error("packed must have the dtype of out");
    check_packed_size(request.addend, "packed", request.sum.size);
    return request;
}

std::vector<NormSlice> read_norm_slices(ArrayReader& reader, py::handle grads,
                                        const std::optional<Vector<std::int64_t>>& sizes) {
    std::vector<NormSlice> slices;
    if (is_list(grads)) {
        if (sizes) throw py::value_error("sizes belongs to a packed array, not to a list of arrays");
        for (const ArrayView& view : reader.read_list(grads, "grads", Access::kRead)) {
            slices.push_back({view.data, view.dtype, view.size});
        }
        return slices;
    }
    const ArrayView packed = reader.read_flat(grads, {"grads"}, Access::kRead);
    if (!sizes) throw py::value_error("sizes is needed with a packed array");
    const std::int64_t count = checked_length(*sizes, "sizes");
    const std::vector<std::int64_t> offsets = offsets_of(sizes->data(), count);
    check_packed_size(packed, "grads", offsets.back());
    for (std::int64_t k = 0; k < count; ++k) {
        slices.push_back({element(packed, offsets[static_cast<std::size_t>(k)]), packed.dtype, sizes->data()[k]});
    }
    return slices;
}

std::vector<UpdateTensor> read_sgd_tensors(ArrayReader& reader, py::handle params, py::handle momenta, py::handle grads,
                                           const Vector<double>& hyper) {
    return read_update(reader, params, momenta, grads, hyper, 3);
}

std::vector<LarsTensor> read_lars_tensors(ArrayReader& reader, py::handle params, py::handle momenta, py::handle grads,
                                          const Vector<double>& hyper, const Vector<bool>& adapt) {
    const std::vector<UpdateTensor> updates = read_update(reader, params, momenta, grads, hyper, 5);
    const std::int64_t count = as_int64(updates.size());
    check_length(adapt, "adapt", count);
    std::vector<LarsTensor> tensors;
    tensors.reserve(updates.size());
    for (std::int64_t k = 0; k < count; ++k) {
        const double* factors = hyper.data(k, 0);
        tensors.push_back({updates[static_cast<std::size_t>(k)], factors[3], factors[4], adapt.data()[k]});
    }
    return tensors;
}

}  // namespace jointspar
