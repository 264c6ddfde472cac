// squared_norms on the device. Contract: jointspar/squared_norms.h; launching: chunk_walk.cuh. NVRTC reads this.
#pragma once

#include "cuda/chunk_sums.cuh"
#include "cuda/chunk_walk.cuh"

namespace jointspar {

struct NormRecord {
    const void* source;  // null: zeros
    int64_t size;
    int64_t index;  // in norms
    DType source_dtype;
    int32_t unused;
};

__device__ JOINTSPAR_INLINE int64_t size_of(const NormRecord& slice) { return slice.size; }
__device__ JOINTSPAR_INLINE const void* source_of(const NormRecord& slice) { return slice.source; }
__device__ JOINTSPAR_INLINE DType source_dtype_of(const NormRecord& slice) { return slice.source_dtype; }

// norms[index] = sum of squares, or its root where is_root. Reads each source once; 1 launch for all dtypes.
// Slice: any record with `index`, size_of, source_of and source_dtype_of.
template <class Slice>
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<float>())
    squared_norms_kernel(const Slice* slices, const int64_t* first_chunk, int64_t num_slices, int64_t chunks_per_block,
                         int32_t is_root, double* norms /* may be null */, SkipState* skip /* may be null */,
                         double* chunk_sums, uint32_t* num_finished) {
#pragma unroll 1
    for (ChunkWalk walk = walk_chunks(first_chunk, num_slices, chunks_per_block); walk.has_chunk(); walk.advance()) {
        const Slice slice = slices[walk.slice];
        const void* source = source_of(slice);
        double sums[1] = {
            source == nullptr ? 0.0 : norm_of_chunk(source, source_dtype_of(slice), walk.in_slice(size_of(slice)))};
        if (finish_chunk(walk, sums, chunk_sums, num_finished) && threadIdx.x == 0) {
            if (norms != nullptr) norms[slice.index] = is_root != 0 ? sqrt(sums[0]) : sums[0];
            if (skip != nullptr) finish_slice(*skip, is_finite(sums[0]), num_slices);
        }
    }
}

}  // namespace jointspar
