// What every launcher needs: the device made current for a call, and a check after each runtime call and launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "jointspar/types.h"

namespace jointspar {

// A CUDA call or launch was refused.
class CudaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a refused launch must not be reported again by the next check
    throw CudaError(std::string(what) + ": " + cudaGetErrorString(status));
}

// Right after <<<...>>>: a bad launch configuration shows here. What a kernel does wrong shows at a later wait.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline cudaStream_t stream_of(const DeviceQueue& queue) { return static_cast<cudaStream_t>(queue.stream); }

// Makes the queue's device current, and the caller's again at the end of the scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(const DeviceQueue& queue) {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != queue.device) check_cuda(cudaSetDevice(queue.device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
};

}  // namespace jointspar
