// How a CUDA grid covers slices (one per tensor), as plain arithmetic that host tests can run.
//
// Slices are cut into chunks of kDeviceChunkSize elements, numbered through all slices; first_chunk[k] is the number
// of the first chunk of slice k, and one more entry holds the end. A block takes `chunks_per_block` consecutive chunks.
#pragma once

#include "common/layer_table.h"

namespace jointspar {

constexpr int kThreadsPerBlock = 256;
constexpr int kWarpSize = 32;

// 16 elements per thread. Large enough to hide the search for the slice and the sum's epilogue behind the other blocks
// of the multiprocessor; small enough that 25M elements make 6,000 blocks, a dozen waves with a short last one, and
// that a network of under a million elements still reaches every multiprocessor.
constexpr int64_t kDeviceChunkSize = 4096;

// Every slice owns a chunk, an empty one too: some block has to write its norms.
JOINTSPAR_HOST_DEVICE inline int64_t num_device_chunks_of(int64_t size) {
    const int64_t num_chunks = num_chunks_of(size, kDeviceChunkSize);
    return num_chunks > 0 ? num_chunks : 1;
}

struct GridShape {
    int64_t num_blocks;
    int64_t chunks_per_block;
};

// The grid for num_chunks > 0 chunks: one each, or more where max_blocks would be exceeded.
JOINTSPAR_HOST_DEVICE inline GridShape grid_of(int64_t num_chunks, int64_t max_blocks) {
    const int64_t chunks_per_block = num_chunks_of(num_chunks, max_blocks);
    return GridShape{num_chunks_of(num_chunks, chunks_per_block), chunks_per_block};
}

// A block's place among the chunks of all slices: chunk `chunk` belongs to slice `slice`.
struct ChunkWalk {
    const int64_t* first_chunk;
    int64_t chunk;
    int64_t end;  // of the block's chunks
    int64_t slice;
    int64_t slice_begin;  // first_chunk[slice]
    int64_t slice_end;    // first_chunk[slice + 1]

    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool has_chunk() const { return chunk < end; }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool is_first_of_slice() const { return chunk == slice_begin; }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE int64_t num_chunks_of_slice() const { return slice_end - slice_begin; }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE Chunk in_slice(int64_t size) const {
        return chunk_of_slice(slice, chunk - slice_begin, size, kDeviceChunkSize);
    }

    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE void enter(int64_t new_slice) {
        slice = new_slice;
        slice_begin = first_chunk[slice];
        slice_end = first_chunk[slice + 1];
    }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE void advance() {
        ++chunk;
        if (chunk < end && chunk == slice_end) enter(slice + 1);
    }
    // To the last of the block's chunks that belong to this slice.
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE void skip_rest_of_slice() {
        chunk = (slice_end < end ? slice_end : end) - 1;
    }
};

// The chunks of a block, before the search for the slice of the first one. first_chunk may be a part of a longer table.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE ChunkWalk chunks_of_block(const int64_t* first_chunk, int64_t num_slices,
                                                                 int64_t chunks_per_block, int64_t block) {
    const int64_t end_of_all = first_chunk[num_slices];
    const int64_t begin = first_chunk[0] + block * chunks_per_block;
    const int64_t end = begin + chunks_per_block < end_of_all ? begin + chunks_per_block : end_of_all;
    return ChunkWalk{first_chunk, begin, end, 0, 0, 0};
}

// A search by a warp for the last entry <= value of an increasing array: it is in [low, low + count). Lane i looks at
// entry low + i * step(); the lanes that saw one <= value are 0 .. num_not_above - 1.
struct WarpSearch {
    int64_t low;
    int64_t count;

    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool is_done() const { return count <= 1; }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE int64_t step() const { return (count + kWarpSize - 1) / kWarpSize; }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE bool is_not_above(const int64_t* starts, int lane, int64_t value) const {
        const int64_t at = lane * step();
        return at < count && starts[low + at] <= value;
    }
    JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE WarpSearch narrowed(int num_not_above) const {
        const int64_t skipped = (num_not_above - 1) * step();
        const int64_t rest = count - skipped;
        return WarpSearch{low + skipped, rest < step() ? rest : step()};
    }
};

// Elements that a thread of the block handles in one go, a vector of kWidth; the block's vectors are next to each
// other.
template <int kWidth>
struct VectorsOfThread {
    static constexpr int kStride = kThreadsPerBlock * kWidth;  // from a thread's vector to its next one
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE int first(int begin, int thread) { return begin + thread * kWidth; }
};

// How many elements of a chunk go by vectors; the rest goes one by one.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE int size_by_vectors(int size, int width, bool is_aligned) {
    return is_aligned ? size - size % width : 0;
}

}  // namespace jointspar
