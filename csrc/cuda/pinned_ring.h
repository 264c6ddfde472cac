// Host-to-device copies that do not wait: the bytes go into a pinned buffer first, which the copy reads later.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cuda/launch.cuh"

namespace jointspar {

// For one stream, whose copies finish in order. Buffers are used in turn; one whose copy is still waiting is not
// touched: the ring grows instead, and when it has grown enough, the call waits for the oldest copy.
class PinnedRing {
  public:
    void copy(std::byte* device, const std::vector<std::byte>& bytes, cudaStream_t stream) {
        Slot& slot = free_slot();
        reserve(slot, bytes.size());
        std::memcpy(slot.memory, bytes.data(), bytes.size());
        check_cuda(cudaMemcpyAsync(device, slot.memory, bytes.size(), cudaMemcpyHostToDevice, stream),
                   "cudaMemcpyAsync (table of slices)");
        check_cuda(cudaEventRecord(slot.copied, stream), "cudaEventRecord");
    }

  private:
    static constexpr std::size_t kMaxSlots = 64;
    static constexpr std::size_t kSmallestSlot = 16384;

    struct Slot {
        void* memory = nullptr;
        std::size_t capacity = 0;
        cudaEvent_t copied = nullptr;
    };

    // slots_[next_] is the one used longest ago.
    Slot& free_slot() {
        const bool is_ready = !slots_.empty() && is_copied(slots_[next_]);
        if (!is_ready && slots_.size() < kMaxSlots) {
            Slot slot;
            check_cuda(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "cudaEventCreateWithFlags");
            slots_.insert(slots_.begin() + static_cast<std::ptrdiff_t>(next_), slot);
        } else if (!is_ready) {
            check_cuda(cudaEventSynchronize(slots_[next_].copied), "cudaEventSynchronize");
        }
        Slot& slot = slots_[next_];
        next_ = (next_ + 1) % slots_.size();
        return slot;
    }

    static bool is_copied(const Slot& slot) {
        const cudaError_t status = cudaEventQuery(slot.copied);
        if (status == cudaErrorNotReady) {
            cudaGetLastError();  // an answer, not an error that the next check should find
            return false;
        }
        check_cuda(status, "cudaEventQuery");
        return true;
    }

    static void reserve(Slot& slot, std::size_t num_bytes) {
        if (num_bytes <= slot.capacity) return;
        if (slot.memory != nullptr) check_cuda(cudaFreeHost(slot.memory), "cudaFreeHost");
        slot.memory = nullptr;
        slot.capacity = 0;
        const std::size_t capacity = std::max(kSmallestSlot, num_bytes + num_bytes / 2);
        check_cuda(cudaHostAlloc(&slot.memory, capacity, cudaHostAllocPortable), "cudaHostAlloc");
        slot.capacity = capacity;
    }

    std::vector<Slot> slots_;
    std::size_t next_ = 0;
};

}  // namespace jointspar
