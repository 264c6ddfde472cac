// Device memory that a call needs besides its arguments: the uploaded table of slices, sums of chunks, counters.
//
// Kept per device and stream, and only grows: in the steady state a call neither allocates nor waits. The table goes
// through a ring of pinned buffers, and not at all while it is the one that is there already.
//
// In a stream capture each call gets memory of its own, written once before the call returns and kept until the process
// ends, since every replay of the graph reads it again. Calls that differ in an argument are captured anew.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/skip_state.h"

namespace jointspar {

// Each keeps a table of its own per stream.
enum class Operation { kPack, kUnpack, kSquaredNorms, kLarsUpdate, kSgdUpdate };
constexpr int kNumOperations = 5;

struct WorkspaceSizes {
    int64_t num_slices;
    int64_t num_doubles;  // scratch
};

// All pointers are device memory.
struct WorkspacePointers {
    const std::byte* table;
    SkipState* skip;         // zero counts
    uint32_t* num_finished;  // [num_slices], zeros
    double* doubles;         // [num_doubles], 16-byte aligned, anything
};

// Holds the stream's workspace until it goes out of scope, which must be after the call's last launch: other threads
// that use the same stream wait, as their launches must not come in between.
class Workspace {
  public:
    // The queue's device must be current. Throws CudaError.
    Workspace(const DeviceQueue& queue, Operation operation, const std::vector<std::byte>& table,
              const WorkspaceSizes& sizes);

    const WorkspacePointers* operator->() const { return &pointers_; }
    int64_t num_multiprocessors() const { return num_multiprocessors_; }

  private:
    RelaxedCapture relaxed_;
    std::unique_lock<std::mutex> lock_;
    WorkspacePointers pointers_{};
    int64_t num_multiprocessors_ = 0;
};

}  // namespace jointspar
