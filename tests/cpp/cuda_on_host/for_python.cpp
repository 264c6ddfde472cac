// Streams for tests that load the CUDA operations on the host as a Python module (tests/unit/test_on_device.py).
#include "cuda_runtime.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* cuda_on_host_new_stream() { return cuda_on_host::new_stream(); }
EXPORTED void cuda_on_host_synchronize(void* stream) { cuda_on_host::synchronize(static_cast<cudaStream_t>(stream)); }
EXPORTED int cuda_on_host_num_launches() { return cuda_on_host::counts.launches; }
