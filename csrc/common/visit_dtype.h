// From a dtype at run time to a type at compile time.
#pragma once

#include "common/float16.h"
#include "jointspar/types.h"

namespace jointspar {

// Calls visit with a value of the element type.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#pragma nv_exec_check_disable  // visit is of the host or of the device, as the caller is
#endif
template <class Visit>
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE auto visit_dtype(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::kFloat64:
            return visit(double{});
        case DType::kBFloat16:
            return visit(BFloat16{});
        case DType::kFloat16:
            return visit(Float16{});
        case DType::kFloat32:
        default:
            return visit(float{});
    }
}

}  // namespace jointspar
