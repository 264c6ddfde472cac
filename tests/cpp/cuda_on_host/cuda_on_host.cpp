#include <setjmp.h>
#include <ucontext.h>

#include <memory>

#include "cuda_runtime.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace cuda_on_host {

unsigned long long exchange[kMaxThreads];
Counts counts;

namespace {

constexpr std::size_t kStackBytes = std::size_t{128} << 10;

// A place where `size` threads meet.
struct Barrier {
    int num_waiting = 0;
    unsigned generation = 0;
};

// Begun by swapcontext; from then on _longjmp switches, which needs no system call.
struct Fiber {
    ucontext_t context{};
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool is_begun = false;
    bool is_finished = false;
};

ucontext_t scheduler;
jmp_buf scheduler_place;
std::vector<Fiber> fibers(kMaxThreads);
Barrier block_barrier;
Barrier warp_barriers[kMaxThreads / kLanes];
const std::function<void()>* current_kernel = nullptr;
bool has_progress = false;

void run_fiber() {
    (*current_kernel)();
    fibers[threadIdx.x].is_finished = true;
    has_progress = true;
    _longjmp(scheduler_place, 1);
}

void wait(Barrier& barrier, int size) {
    const unsigned thread = threadIdx.x;
    const unsigned generation = barrier.generation;
    has_progress = true;
    if (++barrier.num_waiting == size) {
        barrier.num_waiting = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) {
        if (_setjmp(fibers[thread].place) == 0) _longjmp(scheduler_place, 1);
    }
    has_progress = true;
}

void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.is_begun = false;
    fiber.is_finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
}

// Runs a fiber up to its next barrier or its end.
void resume(Fiber& fiber) {
    if (_setjmp(scheduler_place) != 0) return;
    if (fiber.is_begun) _longjmp(fiber.place, 1);
    fiber.is_begun = true;
    swapcontext(&scheduler, &fiber.context);
}

// Threads take turns from barrier to barrier. All waiting and none moving: not all of them reached the same barrier.
void run_block(unsigned num_threads) {
    for (unsigned thread = 0; thread < num_threads; ++thread) start(fibers[thread]);
    bool is_running = true;
    while (is_running) {
        is_running = false;
        has_progress = false;
        for (unsigned thread = 0; thread < num_threads; ++thread) {
            if (fibers[thread].is_finished) continue;
            is_running = true;
            threadIdx.x = thread;
            resume(fibers[thread]);
        }
        if (is_running && !has_progress) {
            std::puts("a barrier was not reached by all threads");
            std::abort();
        }
    }
}

void* poisoned(std::size_t num_bytes) {
    ++counts.allocations;
    void* memory = std::malloc(num_bytes);
    std::memset(memory, 0xA5, num_bytes);
    return memory;
}

}  // namespace

void wait_for_block() { wait(block_barrier, static_cast<int>(blockDim.x)); }
void wait_for_warp() { wait(warp_barriers[threadIdx.x / kLanes], kLanes); }

// The last block first: nothing may depend on their order.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    gridDim = grid;
    blockDim = block;
    current_kernel = &kernel;
    for (unsigned number = grid.x; number-- > 0;) {
        blockIdx.x = number;
        run_block(block.x);
    }
}

cudaStream_t new_stream() {
    static unsigned long long next_id = 1;
    auto* stream = new CUstream_st;
    stream->id = next_id++;
    return stream;
}

void synchronize(cudaStream_t stream) {
    while (!stream->pending.empty()) {
        const auto work = std::move(stream->pending.front());
        stream->pending.pop_front();
        work();
    }
}

void replay(cudaStream_t stream) {
    for (const auto& work : stream->graph) work();
}

}  // namespace cuda_on_host

void CUstream_st::push(std::function<void()> work) {
    if (is_capturing) {
        graph.push_back(std::move(work));
    } else {
        pending.push_back(std::move(work));
    }
}

using cuda_on_host::counts;

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error of the host's CUDA"; }
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 1;  // few multiprocessors: blocks take several chunks where that depends on them
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, std::size_t num_bytes) {
    *memory = cuda_on_host::poisoned(num_bytes);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t num_bytes, unsigned) {
    *memory = cuda_on_host::poisoned(num_bytes);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t num_bytes, cudaMemcpyKind, cudaStream_t stream) {
    ++counts.copies;
    stream->push([=] { std::memcpy(to, from, num_bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t num_bytes, cudaStream_t stream) {
    stream->push([=] { std::memset(memory, value, num_bytes); });
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = cuda_on_host::new_stream();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ++counts.waits;
    cuda_on_host::synchronize(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
    *id = stream->id;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = stream->is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->is_done = false;
    event->stream = stream;
    stream->push([=] { event->is_done = true; });
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return event->is_done ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ++counts.waits;
    while (!event->is_done) {
        const auto work = std::move(event->stream->pending.front());
        event->stream->pending.pop_front();
        work();
    }
    return cudaSuccess;
}
