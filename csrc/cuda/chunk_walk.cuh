// Which chunks a block works on. No host code: NVRTC reads this.
//
// Launching a kernel of this folder from elsewhere (NVRTC; python/jointspar/backends/cupy_jit.py):
//   include path csrc and csrc/include; options --std=c++17 and --fmad=false (products round as on the CPU)
//   slices            [num_slices]      records of the kernel's header, in device memory
//   first_chunk       [num_slices + 1]  int64, in device memory: the running sum of max(1, ceil(size / 4096)), from 0
//   chunks_per_block  1, with first_chunk[num_slices] blocks; or more, with as many fewer blocks
//   256 threads a block, no dynamic shared memory
// Kernels that add up norms also take
//   chunk_sums        [2 * first_chunk[num_slices]]  float64, scratch
//   num_finished      [num_slices]      uint32, zero before the first launch; every launch leaves zeros
#pragma once

#include "common/device_chunks.h"

namespace jointspar {

// Of a multiprocessor at the same time, which limits registers: 64 a thread, 128 where float64 takes part. 1,024
// threads with 64 to 96 bytes under way each are several times what the memory's latency asks for.
template <class... T>
JOINTSPAR_HOST_DEVICE constexpr int min_blocks() {
    return ((sizeof(T) == sizeof(double)) || ...) ? 2 : 4;
}

// The last entry <= value of increasing starts [count], by all threads of each warp; starts[0] <= value.
__device__ JOINTSPAR_INLINE int64_t warp_last_not_above(const int64_t* starts, int64_t count, int64_t value) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    WarpSearch search{0, count};
    while (!search.is_done()) {
        const unsigned votes = __ballot_sync(0xFFFFFFFFu, search.is_not_above(starts, lane, value));
        search = search.narrowed(__popc(votes));
    }
    return search.low;
}

// Where this block begins. All threads call it.
__device__ JOINTSPAR_INLINE ChunkWalk walk_chunks(const int64_t* first_chunk, int64_t num_slices,
                                                  int64_t chunks_per_block) {
    ChunkWalk walk = chunks_of_block(first_chunk, num_slices, chunks_per_block, static_cast<int64_t>(blockIdx.x));
    if (walk.has_chunk()) walk.enter(warp_last_not_above(first_chunk, num_slices, walk.chunk));
    return walk;
}

}  // namespace jointspar
