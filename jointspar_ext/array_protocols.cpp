// What arrays say about themselves: the buffer protocol, DLPack (as a C interface or a capsule) and the CUDA array
// interface. The checks that follow are the same for all: array_view.cpp.
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "argument_errors.h"
#include "array_view.h"

namespace py = pybind11;

namespace jointspar {
namespace {

// Turns the pending Python error, of whatever type, into a TypeError that names the argument.
[[noreturn]] void raise_unreadable(ArgName name, py::handle object) {
    const std::string problem = py::error_already_set().what();
    const std::string first_line = problem.substr(0, problem.find('\n'));  // torch appends a C++ backtrace
    raise_type(name, "(" + type_name(object) + ") cannot be read as a dense array: " + first_line);
}

[[noreturn]] void raise_dtype(ArgName name, Kind kind, const std::string& found) {
    const std::string wanted = kind == Kind::kFlag ? "bool" : "float32, float64, bfloat16 or float16";
    raise_type(name, "must have dtype " + wanted + ", not " + found);
}

void set_flag_type(ArrayView& view) { view.item_bytes = 1; }

void set_float_type(ArrayView& view, DType dtype) {
    view.dtype = dtype;
    view.item_bytes = element_bytes(dtype);
}

void set_type(ArrayView& view, const dlpack::DataType& dtype, ArgName name, Kind kind) {
    if (kind == Kind::kFlag) {
        if (dtype.lanes == 1 && dtype.code == dlpack::kCodeBool && dtype.bits == 8) return set_flag_type(view);
    } else if (dtype.lanes == 1 && dtype.code == dlpack::kCodeFloat) {
        if (dtype.bits == 32) return set_float_type(view, DType::kFloat32);
        if (dtype.bits == 64) return set_float_type(view, DType::kFloat64);
        if (dtype.bits == 16) return set_float_type(view, DType::kFloat16);
    } else if (dtype.lanes == 1 && dtype.code == dlpack::kCodeBFloat && dtype.bits == 16) {
        return set_float_type(view, DType::kBFloat16);
    }
    constexpr std::array<const char*, 7> kKinds{"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    const std::string found = dtype.code < kKinds.size() ? kKinds[dtype.code] : "a type of unknown kind, ";
    raise_dtype(name, kind, found + std::to_string(dtype.bits));
}

// The format character of a buffer, or the type characters of an array interface ("f4" without its byte order).
void set_type(ArrayView& view, const std::string& type, ArgName name, Kind kind, const std::string& shown) {
    if (kind == Kind::kFlag) {
        if (type == "?" || type == "b1") return set_flag_type(view);
    } else {
        if (type == "f" || type == "f4") return set_float_type(view, DType::kFloat32);
        if (type == "d" || type == "f8") return set_float_type(view, DType::kFloat64);
        if (type == "e" || type == "f2") return set_float_type(view, DType::kFloat16);
    }
    raise_dtype(name, kind, shown);
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "array interfaces are read as little-endian");

std::string without_byte_order(const std::string& type) {
    const bool is_native = !type.empty() && std::string("@=<|").find(type.front()) != std::string::npos;
    return is_native ? type.substr(1) : type;
}

std::string place_name(std::int32_t device_type, std::int32_t device_id) {
    switch (device_type) {
        case dlpack::kDeviceCpu:
        case dlpack::kDeviceCudaHost:
            return "the CPU";
        case dlpack::kDeviceCuda:
        case dlpack::kDeviceCudaManaged:
            return "cuda:" + std::to_string(device_id);
        default:
            return "a device of DLPack type " + std::to_string(device_type);
    }
}

// What is looked up once per array type. Types with an API stay alive.
struct ArrayType {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;  // null: none
    PyObject* is_neg;                // torch's methods; null: none
    PyObject* storage_offset;
};

// Where an interpreter is not position-independent its heap lies below, in others nothing does.
constexpr std::uintptr_t kLow = std::uintptr_t{1} << 40;

const dlpack::ExchangeApi* exchange_api(py::handle type) {
    const py::object capsule = py::getattr(type, dlpack::kExchangeApiAttribute, py::none());
    if (PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeApiName) == 0) return nullptr;
    auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApiName));
    while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
    return api != nullptr && api->view_from_object != nullptr ? api : nullptr;
}

ArrayType array_type(py::handle object) {
    static auto& known = *new std::vector<ArrayType>;
    PyTypeObject* type = Py_TYPE(object.ptr());
    for (const ArrayType& entry : known) {
        if (entry.type == type) return entry;
    }
    const py::handle handle(reinterpret_cast<PyObject*>(type));
    const dlpack::ExchangeApi* api = exchange_api(handle);
    if (api == nullptr) return {type, nullptr, nullptr, nullptr};
    const auto method = [&](const char* name) {
        py::object found = py::getattr(handle, name, py::none());
        return found.is_none() ? nullptr : found.release().ptr();
    };
    handle.inc_ref();
    known.push_back({type, api, method("is_neg"), method("storage_offset")});
    return known.back();
}

// torch can defer a negation: the elements in memory are then the negatives of the tensor's, and DLPack does not say.
void check_not_negated(PyObject* is_neg, py::handle object, ArgName name) {
    const auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, object.ptr()));
    if (!result) raise_unreadable(name, object);
    if (result.ptr() == Py_True) raise_value(name, "is a view that torch negates on reading; call resolve_neg() first");
}

bool is_bfloat16_ndarray(py::handle object) {
    const py::object dtype = py::getattr(object, "dtype", py::none());
    return py::str(py::getattr(dtype, "name", py::none())).equal(py::str("bfloat16")) && py::hasattr(object, "view");
}

// What DLPack is to know of the stream of a call. CuPy's is the call's own; others have to be ready for it.
std::int64_t dlpack_stream(py::handle object, std::uintptr_t stream) {
    constexpr std::int64_t kNoSynchronisation = -1;
    constexpr std::int64_t kLegacyDefaultStream = 1;
    const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
    const auto module = py::str(py::getattr(type, "__module__", py::none())).cast<std::string>();
    if (module == "cupy" || module.rfind("cupy.", 0) == 0) return kNoSynchronisation;
    return stream == 0 ? kLegacyDefaultStream : static_cast<std::int64_t>(stream);
}

}  // namespace

// By the first protocol that the object has.
ArrayView ArrayReader::read_by_protocol(py::handle object, ArgName name, Access access, Kind kind) {
    if (PyObject_CheckBuffer(object.ptr()) != 0) {
        check_place(dlpack::kDeviceCpu, 0, name);
        return read_buffer(object, name, access, kind);
    }
    // On a device only torch's, whose current stream is the call's: this exchange orders nothing.
    if (const ArrayType type = array_type(object);
        type.api != nullptr && (device_ == kHost || type.is_neg != nullptr)) {
        dlpack::Tensor tensor{};
        if (type.api->view_from_object(object.ptr(), &tensor) != 0) raise_unreadable(name, object);
        const ArrayView view = read_dlpack(tensor, name, kind);
        if (type.is_neg != nullptr) check_not_negated(type.is_neg, object, name);
        return view;
    }
    if (device_ != kHost && !py::hasattr(object, "__dlpack__") && py::hasattr(object, "__cuda_array_interface__")) {
        return read_cuda_array_interface(object, name, access, kind);
    }
    return read_capsule(object, name, kind);
}

ArrayView ArrayReader::read_buffer(py::handle object, ArgName name, Access access, Kind kind) {
    Py_buffer buffer;
    bool is_bfloat16 = false;
    if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_RECORDS_RO) != 0) {
        py::error_already_set error;
        is_bfloat16 = is_bfloat16_ndarray(object);
        if (!is_bfloat16) {
            error.restore();
            raise_unreadable(name, object);
        }
        owners_.push_back(object.attr("view")("uint16"));  // NumPy exports no buffer of a foreign dtype
        if (PyObject_GetBuffer(owners_.back().ptr(), &buffer, PyBUF_RECORDS_RO) != 0) raise_unreadable(name, object);
    }
    buffers_.push_back(buffer);
    if (access == Access::kWrite && buffer.readonly != 0) raise_value(name, "is read-only");
    ArrayView view;
    view.data = buffer.buf;
    const std::string format = buffer.format != nullptr ? buffer.format : "B";
    if (is_bfloat16 && kind == Kind::kFloat) {
        set_float_type(view, DType::kBFloat16);
    } else {
        set_type(view, without_byte_order(format), name, kind, "buffer format '" + format + "'");
    }
    view.ndim = buffer.ndim;
    static_assert(sizeof(Py_ssize_t) == sizeof(std::int64_t), "a 64-bit platform is needed");
    view.shape = reinterpret_cast<const std::int64_t*>(buffer.shape);
    view.strides = reinterpret_cast<const std::int64_t*>(buffer.strides);
    view.stride_unit = view.item_bytes;
    return view;
}

ArrayView ArrayReader::read_dlpack(const dlpack::Tensor& tensor, ArgName name, Kind kind) {
    check_place(tensor.device.device_type, tensor.device.device_id, name);
    ArrayView view;
    view.data = tensor.data != nullptr ? static_cast<std::byte*>(tensor.data) + tensor.byte_offset : nullptr;
    set_type(view, tensor.dtype, name, kind);
    view.ndim = tensor.ndim;
    view.shape = tensor.shape;
    view.strides = tensor.strides;
    return view;
}

ArrayView ArrayReader::read_capsule(py::handle object, ArgName name, Kind kind) {
    if (!py::hasattr(object, "__dlpack__")) raise_type(name, "must be an array, not " + type_name(object));
    try {
        py::object source = py::reinterpret_borrow<py::object>(object);
        // torch before 2.10: it exports only tensors that need no gradient; detaching shares the memory.
        if (py::hasattr(object, "detach")) source = object.attr("detach")();
        if (device_ == kHost) {
            owners_.push_back(source.attr("__dlpack__")());
        } else {
            const auto [type, id] = source.attr("__dlpack_device__")().cast<std::pair<std::int32_t, std::int32_t>>();
            check_place(type, id, name);  // a host array would not know what a stream is
            owners_.push_back(source.attr("__dlpack__")(py::arg("stream") = dlpack_stream(object, stream_)));
        }
    } catch (py::error_already_set& error) {
        error.restore();
        raise_unreadable(name, object);
    }
    void* managed = PyCapsule_GetPointer(owners_.back().ptr(), dlpack::kManagedTensorName);
    if (managed == nullptr) raise_unreadable(name, object);
    if (py::hasattr(object, "is_neg")) {
        check_not_negated(py::handle(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))).attr("is_neg").ptr(), object,
                          name);
    }
    return read_dlpack(static_cast<const dlpack::ManagedTensor*>(managed)->tensor, name, kind);
}

// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, versions 2 and 3
ArrayView ArrayReader::read_cuda_array_interface(py::handle object, ArgName name, Access access, Kind kind) {
    ArrayView view;
    try {
        const py::dict interface = object.attr("__cuda_array_interface__");
        const auto [address, is_read_only] = interface["data"].cast<std::pair<std::uintptr_t, bool>>();
        if (access == Access::kWrite && is_read_only) raise_value(name, "is read-only");
        view.data = reinterpret_cast<void*>(address);
        const auto type = interface["typestr"].cast<std::string>();
        set_type(view, without_byte_order(type), name, kind, "'" + type + "'");
        const auto& shape = dims_.emplace_back(interface["shape"].cast<std::vector<std::int64_t>>());
        view.ndim = static_cast<std::int32_t>(shape.size());
        view.shape = shape.data();
        if (interface.contains("strides") && !interface["strides"].is_none()) {
            const auto& strides = dims_.emplace_back(interface["strides"].cast<std::vector<std::int64_t>>());
            if (strides.size() != shape.size()) raise_value(name, "has strides of another number of dimensions");
            view.strides = strides.data();
            view.stride_unit = view.item_bytes;
        }
    } catch (py::error_already_set& error) {
        error.restore();
        raise_unreadable(name, object);
    } catch (const py::cast_error&) {
        raise_type(name, "has a __cuda_array_interface__ that cannot be read");
    }
    return view;
}

// A storage that was given back leaves null, to which torch adds a view's offset. Its size is asked for only where the
// address is that offset: the question takes as long as everything else about a small tensor.
bool ArrayReader::has_memory(py::handle object, const ArrayView& view) {
    if (view.data == nullptr) return false;
    const auto address = reinterpret_cast<std::uintptr_t>(view.data);
    if (address >= kLow || PyObject_CheckBuffer(object.ptr()) != 0) return true;
    PyObject* const method = array_type(object).storage_offset;
    if (method == nullptr && !py::hasattr(object, "untyped_storage")) return true;
    const auto offset = method == nullptr
                            ? object.attr("storage_offset")()  // torch before 2.10
                            : py::reinterpret_steal<py::object>(PyObject_CallOneArg(method, object.ptr()));
    if (!offset) throw py::error_already_set();
    if (address != static_cast<std::uintptr_t>(py::cast<std::int64_t>(offset) * view.item_bytes)) return true;
    return py::cast<std::int64_t>(object.attr("untyped_storage")().attr("nbytes")()) > 0;
}

void ArrayReader::check_place(std::int32_t device_type, std::int32_t device_id, ArgName name) const {
    const bool is_host = device_type == dlpack::kDeviceCpu || device_type == dlpack::kDeviceCudaHost;
    const bool is_cuda = device_type == dlpack::kDeviceCuda || device_type == dlpack::kDeviceCudaManaged;
    if (device_ == kHost ? is_host : is_cuda && device_id == device_) return;
    const std::string wanted = device_ == kHost ? "the CPU" : "cuda:" + std::to_string(device_);
    raise_type(name, "is on " + place_name(device_type, device_id) + ", not on " + wanted + " as this call needs");
}

}  // namespace jointspar
