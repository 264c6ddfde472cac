// Stands in for the CUDA toolkit's header of this name: compiles kernels and launchers as C++ and runs them on the
// host, one fiber per CUDA thread, so that their index arithmetic, barriers, sums and bookkeeping are tested without a
// GPU. Blocks run one after another. Work on a stream waits until somebody synchronizes, as on a busy device.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    dim3(unsigned x_ = 1) : x(x_) {}  // not explicit, as in the toolkit
    unsigned x, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// --- what a kernel sees ----------------------------------------------------------------------------------------------
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_on_host {
constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
void wait_for_block();
void wait_for_warp();
extern unsigned long long exchange[kMaxThreads];  // one word per thread

template <class T>
T* checked(T* pointer) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % sizeof(T) != 0) {
        std::puts("misaligned access");
        std::abort();
    }
    return pointer;
}
}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait_for_block(); }
inline int __syncthreads_or(int predicate) {
    cuda_on_host::exchange[threadIdx.x] = predicate != 0 ? 1 : 0;
    cuda_on_host::wait_for_block();
    unsigned long long any = 0;
    for (unsigned thread = 0; thread < blockDim.x; ++thread) any |= cuda_on_host::exchange[thread];
    cuda_on_host::wait_for_block();
    return static_cast<int>(any);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    static_assert(sizeof(T) <= sizeof(unsigned long long));
    std::memcpy(&cuda_on_host::exchange[threadIdx.x], &value, sizeof(T));
    cuda_on_host::wait_for_warp();
    T other;
    std::memcpy(&other, &cuda_on_host::exchange[threadIdx.x ^ static_cast<unsigned>(distance)], sizeof(T));
    cuda_on_host::wait_for_warp();
    return other;
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    cuda_on_host::exchange[threadIdx.x] = predicate ? 1 : 0;
    cuda_on_host::wait_for_warp();
    const unsigned first = threadIdx.x / cuda_on_host::kLanes * cuda_on_host::kLanes;
    unsigned votes = 0;
    for (unsigned lane = 0; lane < cuda_on_host::kLanes; ++lane) {
        votes |= static_cast<unsigned>(cuda_on_host::exchange[first + lane]) << lane;
    }
    cuda_on_host::wait_for_warp();
    return votes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence() {}
template <class T>
T atomicAdd(T* target, T value) {
    const T before = *target;
    *target = before + value;
    return before;
}
template <class T>
T atomicExch(T* target, T value) {
    const T before = *target;
    *target = value;
    return before;
}
template <class T>
T __ldca(const T* from) {
    return *cuda_on_host::checked(from);
}
template <class T>
T __ldcg(const T* from) {
    return *cuda_on_host::checked(from);
}
template <class T>
T __ldcs(const T* from) {
    return *cuda_on_host::checked(from);
}
template <class T>
void __stwb(T* to, T value) {
    *cuda_on_host::checked(to) = value;
}
template <class T>
void __stcs(T* to, T value) {
    *cuda_on_host::checked(to) = value;
}

// --- the runtime -----------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotReady };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocPortable = 1;

struct CUstream_st {
    unsigned long long id = 0;
    bool is_capturing = false;
    std::deque<std::function<void()>> pending;
    std::vector<std::function<void()>> graph;  // what was captured
    void push(std::function<void()> work);
};
using cudaStream_t = CUstream_st*;
struct CUevent_st {
    bool is_done = true;
    cudaStream_t stream = nullptr;
};
using cudaEvent_t = CUevent_st*;

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace cuda_on_host {
struct Counts {
    int launches = 0;
    int copies = 0;
    int allocations = 0;  // of device and pinned memory
    int waits = 0;
};
extern Counts counts;
cudaStream_t new_stream();
void synchronize(cudaStream_t stream);  // runs what is pending
void replay(cudaStream_t stream);       // runs what was captured
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel);
}  // namespace cuda_on_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const dim3 grid = config->gridDim;
    const dim3 block = config->blockDim;
    if (grid.x == 0 || block.x == 0 || block.x > cuda_on_host::kMaxThreads) return cudaErrorInvalidValue;
    ++cuda_on_host::counts.launches;
    config->stream->push([=] { cuda_on_host::run_grid(grid, block, [=] { kernel(arguments...); }); });
    return cudaSuccess;
}

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** memory, std::size_t num_bytes);
cudaError_t cudaHostAlloc(void** memory, std::size_t num_bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t num_bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
