#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "cuda/launch.cuh"
#include "cuda/pinned_ring.h"
#include "cuda/workspace.h"

namespace jointspar {
namespace {

constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t counter_bytes(const WorkspaceSizes& sizes) {
    return aligned(static_cast<int64_t>(sizeof(SkipState)) + sizes.num_slices * static_cast<int64_t>(sizeof(uint32_t)));
}

int64_t double_bytes(const WorkspaceSizes& sizes) {
    return aligned(sizes.num_doubles * static_cast<int64_t>(sizeof(double)));
}

std::byte* allocate(int64_t num_bytes) {
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, static_cast<std::size_t>(num_bytes)), "cudaMalloc (workspace)");
    return static_cast<std::byte*>(memory);
}

// Grows by at least half and never frees: kernels under way may still use the old block, and freeing it would wait for
// them. What is given up this way adds up to less than twice what is in use.
class DeviceMemory {
  public:
    // True when the memory is new: its content is undefined.
    bool reserve(int64_t num_bytes) {
        if (num_bytes <= capacity_) return false;
        const int64_t capacity = aligned(std::max(num_bytes, capacity_ + capacity_ / 2));
        data_ = allocate(capacity);
        capacity_ = capacity;
        return true;
    }
    std::byte* data() const { return data_; }
    int64_t capacity() const { return capacity_; }

  private:
    std::byte* data_ = nullptr;
    int64_t capacity_ = 0;
};

class UploadedTable {
  public:
    const std::byte* upload(const std::vector<std::byte>& table, PinnedRing& ring, cudaStream_t stream) {
        const bool is_new = memory_.reserve(static_cast<int64_t>(table.size()));
        if (!is_new && table == content_) return memory_.data();
        content_.clear();  // unknown, should the copy fail
        ring.copy(memory_.data(), table, stream);
        content_ = table;
        return memory_.data();
    }

  private:
    DeviceMemory memory_;
    std::vector<std::byte> content_;
};

struct StreamMemory {
    std::mutex mutex;
    PinnedRing ring;
    std::array<UploadedTable, kNumOperations> tables;
    DeviceMemory counters;
    DeviceMemory doubles;
};

// Counters come first, then scratch; both places are aligned.
WorkspacePointers pointers_to(std::byte* counters, std::byte* doubles, const std::byte* table) {
    return {table, reinterpret_cast<SkipState*>(counters), reinterpret_cast<uint32_t*>(counters + sizeof(SkipState)),
            reinterpret_cast<double*>(doubles)};
}

// Streams are told apart by their id, which is never used again, unlike a handle. Nothing is freed at exit, when the
// driver may be gone.
StreamMemory& memory_of(int32_t device, cudaStream_t stream) {
    static std::mutex mutex;
    static auto& memories = *new std::map<std::pair<int32_t, unsigned long long>, std::unique_ptr<StreamMemory>>;
    unsigned long long id = 0;
    check_cuda(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    const std::lock_guard<std::mutex> guard(mutex);
    std::unique_ptr<StreamMemory>& memory = memories[{device, id}];
    if (memory == nullptr) memory = std::make_unique<StreamMemory>();
    return *memory;
}

bool is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

// Outside of the capture: on a stream of its own, complete when this returns.
WorkspacePointers memory_for_graph(const std::vector<std::byte>& table, const WorkspaceSizes& sizes) {
    const int64_t num_counter_bytes = counter_bytes(sizes);
    const int64_t num_double_bytes = double_bytes(sizes);
    std::byte* counters = allocate(num_counter_bytes + num_double_bytes + static_cast<int64_t>(table.size()));
    std::byte* doubles = counters + num_counter_bytes;
    std::byte* device_table = doubles + num_double_bytes;
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    cudaError_t status = cudaMemsetAsync(counters, 0, static_cast<std::size_t>(num_counter_bytes), stream);
    if (status == cudaSuccess) {
        status = cudaMemcpyAsync(device_table, table.data(), table.size(), cudaMemcpyHostToDevice, stream);
    }
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check_cuda(status, "workspace of a captured graph");
    return pointers_to(counters, doubles, device_table);
}

WorkspacePointers memory_for_stream(StreamMemory& memory, cudaStream_t stream, Operation operation,
                                    const std::vector<std::byte>& table, const WorkspaceSizes& sizes) {
    if (memory.counters.reserve(counter_bytes(sizes))) {
        const auto num_bytes = static_cast<std::size_t>(memory.counters.capacity());
        const cudaError_t status = cudaMemsetAsync(memory.counters.data(), 0, num_bytes, stream);
        if (status != cudaSuccess) memory.counters = DeviceMemory();  // the next call begins anew
        check_cuda(status, "cudaMemsetAsync (workspace)");
    }
    memory.doubles.reserve(double_bytes(sizes));
    const std::byte* device_table =
        memory.tables[static_cast<std::size_t>(operation)].upload(table, memory.ring, stream);
    return pointers_to(memory.counters.data(), memory.doubles.data(), device_table);
}

}  // namespace

Workspace::Workspace(const DeviceQueue& queue, Operation operation, const std::vector<std::byte>& table,
                     const WorkspaceSizes& sizes) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, queue.device), "cudaDeviceGetAttribute");
    num_multiprocessors_ = count;
    cudaStream_t stream = stream_of(queue);
    if (is_capturing(stream)) {
        pointers_ = memory_for_graph(table, sizes);
        return;
    }
    StreamMemory& memory = memory_of(queue.device, stream);
    lock_ = std::unique_lock<std::mutex>(memory.mutex);
    pointers_ = memory_for_stream(memory, stream, operation, table, sizes);
}

}  // namespace jointspar
