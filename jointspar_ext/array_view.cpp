#include "array_view.h"

#include <algorithm>
#include <array>
#include <utility>

#include "argument_errors.h"

namespace py = pybind11;

namespace jointspar {
namespace {

constexpr int kMaxDims = 64;

std::int64_t element_count(const ArrayView& view, ArgName name) {
    if (view.ndim < 0 || view.ndim > kMaxDims) raise_value(name, "has more than 64 dimensions");
    std::int64_t size = 1;
    for (int d = 0; d < view.ndim; ++d) {
        if (view.shape[d] == 0) return 0;
        if (view.shape[d] < 0 || __builtin_mul_overflow(size, view.shape[d], &size)) {
            raise_value(name, "has an impossible shape");
        }
    }
    return size;
}

bool is_c_contiguous(const ArrayView& view) {
    if (view.strides == nullptr) return true;
    std::int64_t expected = view.stride_unit;
    for (int d = view.ndim - 1; d >= 0; --d) {
        if (view.shape[d] != 1 && view.strides[d] != expected) return false;
        expected *= view.shape[d];
    }
    return true;
}

// Contiguous after some permutation of its dimensions.
bool is_dense(const ArrayView& view) {
    if (view.size == 0 || is_c_contiguous(view)) return true;
    std::array<std::pair<std::int64_t, std::int64_t>, kMaxDims> dims;  // (stride, extent)
    std::size_t count = 0;
    for (int d = 0; d < view.ndim; ++d) {
        if (view.shape[d] != 1) dims[count++] = {view.strides[d], view.shape[d]};
    }
    std::sort(dims.begin(), dims.begin() + static_cast<std::ptrdiff_t>(count));
    std::int64_t expected = view.stride_unit;
    for (std::size_t k = 0; k < count; ++k) {
        if (dims[k].first != expected) return false;
        expected *= dims[k].second;
    }
    return true;
}

}  // namespace

std::string ArgName::str() const {
    return index < 0 ? std::string(name) : std::string(name) + "[" + std::to_string(index) + "]";
}

ArrayReader::~ArrayReader() {
    for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
}

ArrayView ArrayReader::read(py::handle object, ArgName name, Access access, Kind kind) {
    owners_.push_back(py::reinterpret_borrow<py::object>(object));
    ArrayView view = read_by_protocol(object, name, access, kind);
    view.size = element_count(view, name);
    if (view.size == 0) {
        view.data = nullptr;
        return view;
    }
    if (!has_memory(object, view)) raise_type(name, "(" + type_name(object) + ") has no memory of its own");
    if (!is_dense(view)) {
        raise_value(name,
                    "is not dense: gaps, expanded dimensions and negative strides are not supported; "
                    "make a contiguous copy");
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(view.data);
    if (begin % static_cast<std::uintptr_t>(view.item_bytes) != 0) raise_value(name, "is not aligned in memory");
    intervals_.push_back({begin, begin + static_cast<std::uintptr_t>(view.size * view.item_bytes), access, name});
    return view;
}

ArrayView ArrayReader::read_flat(py::handle object, ArgName name, Access access, std::int64_t size, Kind kind) {
    const ArrayView view = read(object, name, access, kind);
    if (view.ndim != 1) raise_value(name, "must have one dimension, not " + std::to_string(view.ndim));
    if (size >= 0 && view.size != size) {
        raise_value(name, "must have " + std::to_string(size) + " elements, not " + std::to_string(view.size));
    }
    return view;
}

std::vector<ArrayView> ArrayReader::read_list(py::handle list, const char* name, Access access, bool allows_none) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
        raise_type({name}, "must be a list of arrays, not " + type_name(list));
    }
    // A tuple of its own: reading runs foreign code, which could change a list.
    const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
    if (!items) throw py::error_already_set();
    std::vector<ArrayView> views;
    views.reserve(items.size());
    for (const py::handle item : items) {
        const ArgName item_name{name, static_cast<std::int64_t>(views.size())};
        if (!item.is_none()) {
            views.push_back(read(item, item_name, access));
        } else if (allows_none) {
            views.emplace_back().is_none = true;
        } else {
            raise_type(item_name, "must be an array, not None");
        }
    }
    return views;
}

void ArrayReader::check_no_overlap() {
    std::sort(intervals_.begin(), intervals_.end(),
              [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
    const Interval* furthest = nullptr;          // of all before this one, the one that ends last
    const Interval* furthest_written = nullptr;  // the same among those that are written
    for (const Interval& interval : intervals_) {
        const Interval* other = interval.access == Access::kWrite ? furthest : furthest_written;
        if (other != nullptr && other->end > interval.begin) {
            raise_value(interval.name, "overlaps " + other->name.str() + " in memory");
        }
        if (furthest == nullptr || interval.end > furthest->end) furthest = &interval;
        if (interval.access == Access::kWrite &&
            (furthest_written == nullptr || interval.end > furthest_written->end)) {
            furthest_written = &interval;
        }
    }
}

void check_same_layout(const ArrayView& array, ArgName name, const ArrayView& like, ArgName like_name) {
    bool same = array.ndim == like.ndim && std::equal(array.shape, array.shape + array.ndim, like.shape);
    if (!same) raise_value(name, "must have the shape of " + like_name.str());
    if (is_c_contiguous(array) && is_c_contiguous(like)) return;
    // A view without strides is C-contiguous; against one that is not, some stride differs.
    same = array.strides != nullptr && like.strides != nullptr;
    for (int d = 0; same && d < array.ndim; ++d) {
        same = array.shape[d] == 1 || array.strides[d] / array.stride_unit == like.strides[d] / like.stride_unit;
    }
    if (!same && array.size != 0) raise_value(name, "must have the strides of " + like_name.str());
}

}  // namespace jointspar
