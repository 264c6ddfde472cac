// What every launcher needs: the device made current for a call, and a check after each runtime call and launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/device_chunks.h"
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

inline cudaStream_t stream_of(const DeviceQueue& queue) { return static_cast<cudaStream_t>(queue.stream); }

constexpr int64_t kMaxBlocks = 2147483647;  // of a grid's first dimension

struct Grid {
    Grid(int64_t num_blocks_, uint32_t num_threads_ = kThreadsPerBlock)  // not explicit: most kernels need one number
        : num_blocks(num_blocks_), num_threads(num_threads_) {}
    int64_t num_blocks;
    uint32_t num_threads;  // of a block
};

// Launches a kernel and checks that it was accepted: a bad configuration shows here, what a kernel does wrong at a
// later wait. `name` is for the error.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const DeviceQueue& queue,
            Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.num_blocks));
    config.blockDim = dim3(grid.num_threads);
    config.stream = stream_of(queue);
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// Makes the queue's device current, and the caller's again at the end of the scope. The destructor has nobody to tell
// of a failure; whoever comes next finds it.
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

// For the scope of a call. Allocations, event queries and the loading of a kernel at its first launch are forbidden to
// every thread while some thread captures a stream, unless a thread says, as here, that it knows what it does: nothing
// here touches what is being captured.
class RelaxedCapture {
  public:
    RelaxedCapture() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace jointspar
