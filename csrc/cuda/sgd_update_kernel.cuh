// sgd_update on the device. Contract: jointspar/sgd_update.h; launching: chunk_walk.cuh. NVRTC reads this.
#pragma once

#include "cuda/chunk_update.cuh"
#include "cuda/chunk_walk.cuh"

namespace jointspar {

struct SgdRecord {
    UpdateTensor update;
    int64_t index;  // in grad_norms
};

__device__ JOINTSPAR_INLINE int64_t size_of(const SgdRecord& slice) { return slice.update.size; }
__device__ JOINTSPAR_INLINE const void* source_of(const SgdRecord& slice) { return slice.update.grad; }
__device__ JOINTSPAR_INLINE DType source_dtype_of(const SgdRecord& slice) { return slice.update.grad_dtype; }

// Reads parameters, momenta and gradients once, writes parameters and momenta once; 1 launch per pair of dtypes. Before
// it, where updates with values that are not finite are to be skipped, squared_norms_kernel<SgdRecord> fills `skip` and
// the norms: then grad_norms is null here.
template <class Param, class Grad>
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<Param, Grad>())
    sgd_update_kernel(const SgdRecord* slices, const int64_t* first_chunk, int64_t num_slices, int64_t chunks_per_block,
                      int32_t nesterov, const SkipState* skip /* may be null */, double* grad_norms /* may be null */,
                      double* chunk_sums, uint32_t* num_finished) {
    if (skip != nullptr && skip->is_skipped != 0) return;
    constexpr double kLocalRate = 1.0;
#pragma unroll 1
    for (ChunkWalk walk = walk_chunks(first_chunk, num_slices, chunks_per_block); walk.has_chunk(); walk.advance()) {
        const SgdRecord slice = slices[walk.slice];
        const Chunk chunk = walk.in_slice(slice.update.size);
        const auto updated = update_chunk<SumOf::kGrads, Param, Grad>(slice.update, chunk, kLocalRate, nesterov != 0);
        if (grad_norms == nullptr) continue;
        double sums[1] = {0.0};
        if (updated.grads != nullptr) {
            sums[0] = checked_block_sum(updated.squares, updated.grads, static_cast<int>(chunk.size));
        }
        if (finish_chunk(walk, sums, chunk_sums, num_finished) && threadIdx.x == 0) {
            grad_norms[slice.index] = sqrt(sums[0]);
        }
    }
}

}  // namespace jointspar
