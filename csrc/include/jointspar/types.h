// Types that every op shares. Part of the contract between kernels and bindings: no Python, torch or MPI.
#pragma once

#include "common/portable.h"

namespace jointspar {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Bytes of one element.
JOINTSPAR_HOST_DEVICE constexpr int64_t element_bytes(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// One gradient's place on its way into or out of the packed buffer.
// `offset` and `size` count elements. A null `source` packs zeros (a layer that only other ranks computed).
struct PackSlice {
    const void* source;
    DType source_dtype;
    int64_t offset;
    int64_t size;
    double scale;
};

struct UnpackSlice {
    void* target;
    DType target_dtype;
    int64_t offset;
    int64_t size;
};

struct NormSlice {
    const void* source;
    DType source_dtype;
    int64_t size;
};

// One parameter tensor with its momentum and gradient: flat, in memory order, `size` elements each.
// momentum_buffer has accumulator type: float64 for float64 parameters, else float32.
struct UpdateTensor {
    void* param;
    void* momentum_buffer;
    const void* grad;  // null: a gradient of zeros
    int64_t size;
    DType param_dtype;
    DType grad_dtype;
    double lr;
    double momentum;
    double weight_decay;
};

// Where a CUDA operation runs: all of its work is put on `stream` (a cudaStream_t) of device `device`, and the call
// returns without waiting for it. Throws CudaError (std::runtime_error) where a launch is refused.
struct DeviceQueue {
    int32_t device;
    void* stream;
};

}  // namespace jointspar
