// From Python's arguments to the slices and tensors that kernels take: lengths, sizes and layouts are checked here, for
// host and device alike. Single arrays are array_view.h's matter.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "array_view.h"
#include "jointspar/lars_update.h"
#include "jointspar/sample_layers.h"
#include "jointspar/types.h"

namespace jointspar {

template <class T>
using Vector = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

inline std::int64_t as_int64(std::size_t count) { return static_cast<std::int64_t>(count); }

template <class T>
void check_length(const Vector<T>& vector, const char* name, std::int64_t length) {
    if (vector.ndim() != 1 || vector.size() != length) {
        throw pybind11::value_error(std::string(name) + " must have one dimension of " + std::to_string(length) +
                                    " elements");
    }
}

template <class T>
std::int64_t checked_length(const Vector<T>& vector, const char* name) {
    if (vector.ndim() != 1) throw pybind11::value_error(std::string(name) + " must have one dimension");
    return vector.size();
}

void check_packed_size(const ArrayView& packed, const char* name, std::int64_t total);

Strategy parse_strategy(const std::string& strategy);
Draw parse_draw(const std::string& draw);
// None is 0, as sample_layers.h has it.
std::uint64_t parse_run_length(const std::optional<std::uint64_t>& run_length);

struct PackRequest {
    std::vector<PackSlice> slices;
    ArrayView packed;
};

PackRequest read_pack(ArrayReader& reader, pybind11::handle grads, const Vector<double>& scales,
                      const Vector<std::int64_t>& sizes, pybind11::handle packed);

struct UnpackRequest {
    ArrayView packed;
    std::vector<UnpackSlice> slices;
};

UnpackRequest read_unpack(ArrayReader& reader, pybind11::handle packed, pybind11::handle outs);

struct AddRequest {
    ArrayView sum;
    ArrayView addend;
};

AddRequest read_add(ArrayReader& reader, pybind11::handle out, pybind11::handle packed);

// Of a list of arrays, or of the slices of a packed one that `sizes` describes.
std::vector<NormSlice> read_norm_slices(ArrayReader& reader, pybind11::handle grads,
                                        const std::optional<Vector<std::int64_t>>& sizes);

// hyper [num_tensors, 3]: lr, momentum, weight_decay
std::vector<UpdateTensor> read_sgd_tensors(ArrayReader& reader, pybind11::handle params, pybind11::handle momenta,
                                           pybind11::handle grads, const Vector<double>& hyper);

// hyper [num_tensors, 5]: lr, momentum, weight_decay, trust_coefficient, eps
std::vector<LarsTensor> read_lars_tensors(ArrayReader& reader, pybind11::handle params, pybind11::handle momenta,
                                          pybind11::handle grads, const Vector<double>& hyper,
                                          const Vector<bool>& adapt);

}  // namespace jointspar
