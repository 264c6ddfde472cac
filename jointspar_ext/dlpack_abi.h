// The part of the DLPack 1.x binary interface that reading an array needs (https://dmlc.github.io/dlpack).
// Written out here so that the build needs neither torch's nor DLPack's headers.
#pragma once

#include <cstdint>

namespace jointspar::dlpack {

constexpr std::int32_t kDeviceCpu = 1;
constexpr std::int32_t kDeviceCuda = 2;
constexpr std::int32_t kDeviceCudaHost = 3;      // pinned host memory
constexpr std::int32_t kDeviceCudaManaged = 13;  // on host and device
constexpr std::uint8_t kCodeFloat = 2;
constexpr std::uint8_t kCodeBFloat = 4;
constexpr std::uint8_t kCodeBool = 6;
constexpr std::uint32_t kMajorVersion = 1;

struct Device {
    std::int32_t device_type;
    std::int32_t device_id;
};

struct DataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null: C-contiguous
    std::uint64_t byte_offset;
};

// What a capsule named "dltensor" points to, as far as it is read.
struct ManagedTensor {
    Tensor tensor;
    void* manager_context;
    void (*deleter)(ManagedTensor*);
};
inline constexpr char kManagedTensorName[] = "dltensor";

struct Version {
    std::uint32_t major;
    std::uint32_t minor;
};

// What the capsule type(array).__dlpack_c_exchange_api__ points to. Function pointers that are not called here have
// their types left out.
struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    void (*managed_tensor_allocator)();
    void (*managed_tensor_from_object)();
    void (*managed_tensor_to_object)();
    // Fills a view that borrows shape, strides and data from the object; 0, or -1 with a Python error. May be null.
    int (*view_from_object)(void* object, Tensor* view);
    void (*current_work_stream)();
};
inline constexpr char kExchangeApiAttribute[] = "__dlpack_c_exchange_api__";
inline constexpr char kExchangeApiName[] = "dlpack_exchange_api";

}  // namespace jointspar::dlpack
