// Runs kernels of csrc/cuda on the host as cuLaunchKernel would: by name, with the addresses of their arguments.
// Whoever includes it defines kKernels; see tests/kernels_on_host.py.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>

#include "cuda_runtime.h"

using KernelCall = void (*)(unsigned num_blocks, unsigned num_threads, void** arguments);

template <class... Parameters, std::size_t... kAt>
void call(void (*kernel)(Parameters...), unsigned num_blocks, unsigned num_threads, void** arguments,
          std::index_sequence<kAt...>) {
    cuda_on_host::run_grid(dim3(num_blocks), dim3(num_threads),
                           [=] { kernel(*static_cast<Parameters*>(arguments[kAt])...); });
}

// The sizes of the parameters, so that a caller's arguments can be compared with them.
template <class... Parameters>
std::vector<std::size_t> sizes_of(void (*)(Parameters...)) {
    return {sizeof(Parameters)...};
}

template <class... Parameters>
constexpr auto indices_of(void (*)(Parameters...)) {
    return std::index_sequence_for<Parameters...>{};
}

template <auto kKernel>
void call_kernel(unsigned num_blocks, unsigned num_threads, void** arguments) {
    call(kKernel, num_blocks, num_threads, arguments, indices_of(kKernel));
}

struct NamedKernel {
    KernelCall call;
    std::vector<std::size_t> sizes;
};

template <auto kKernel>
NamedKernel named() {
    return {&call_kernel<kKernel>, sizes_of(kKernel)};
}

extern const std::unordered_map<std::string, NamedKernel> kKernels;

// 0: done; 1: no such kernel; 2: other arguments than it takes.
extern "C" int run_kernel(const char* name, unsigned num_blocks, unsigned num_threads, void** arguments,
                          const std::size_t* sizes, std::size_t count) {
    const auto found = kKernels.find(name);
    if (found == kKernels.end()) return 1;
    if (found->second.sizes != std::vector<std::size_t>(sizes, sizes + count)) return 2;
    found->second.call(num_blocks, num_threads, arguments);
    return 0;
}
