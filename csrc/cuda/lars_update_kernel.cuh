// lars_update on the device: one launch that measures, one that updates. Contract: jointspar/lars_update.h; launching:
// chunk_walk.cuh. NVRTC reads this.
#pragma once

#include "cuda/chunk_update.cuh"
#include "cuda/chunk_walk.cuh"

namespace jointspar {

struct LarsRecord {
    UpdateTensor update;
    int64_t index;  // in the arrays of norms
    double trust_coefficient;
    double eps;
    int64_t adapt;
};

// What the first launch hands to the second, one per slice.
struct LarsRate {
    double local_rate;
    double param_norm;  // before the update
};

// A norm that the caller may know; NaN, or no array: it is measured.
__device__ JOINTSPAR_INLINE double known_norm(const double* norms, int64_t index) {
    return norms == nullptr ? bit_cast<double>(uint64_t{0x7FF8000000000000u}) : norms[index];
}

// Measures what is not known and finds the local rates; slices whose norms are known cost a few reads. Read: parameters
// and gradients of unknown norms, once. 1 launch for all dtypes. used_grad_norms may be grad_norms: a slice's norm is
// written when all of its chunks have looked at it, or with the value that was there.
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<float>())
    lars_rates_kernel(const LarsRecord* slices, const int64_t* first_chunk, int64_t num_slices,
                      int64_t chunks_per_block, const double* param_norms /* may be null */,
                      const double* grad_norms /* may be null */, double* used_grad_norms, LarsRate* rates,
                      SkipState* skip /* may be null */, double* chunk_sums, uint32_t* num_finished) {
#pragma unroll 1
    for (ChunkWalk walk = walk_chunks(first_chunk, num_slices, chunks_per_block); walk.has_chunk(); walk.advance()) {
        const LarsRecord& slice = slices[walk.slice];
        const Chunk chunk = walk.in_slice(slice.update.size);
        double param_norm = known_norm(param_norms, slice.index);
        double grad_norm = known_norm(grad_norms, slice.index);
        const bool measures_params = is_nan(param_norm);
        const bool measures_grads = is_nan(grad_norm);
        bool is_finished = walk.is_first_of_slice();
        if (measures_params || measures_grads) {
            const bool has_grads = measures_grads && slice.update.grad != nullptr;
            double sums[2] = {
                measures_params ? norm_of_chunk(slice.update.param, slice.update.param_dtype, chunk) : 0.0,
                has_grads ? norm_of_chunk(slice.update.grad, slice.update.grad_dtype, chunk) : 0.0};
            if (!measures_params && !has_grads) __syncthreads();  // sums wait too: all threads have read known norms
            is_finished = finish_chunk(walk, sums, chunk_sums, num_finished);
            if (measures_params) param_norm = sqrt(sums[0]);
            if (measures_grads) grad_norm = sqrt(sums[1]);
        } else {
            walk.skip_rest_of_slice();
        }
        if (!is_finished || threadIdx.x != 0) continue;
        rates[walk.slice].param_norm = param_norm;
        rates[walk.slice].local_rate =
            slice.adapt == 0
                ? 1.0
                : lars_local_rate(slice.trust_coefficient, slice.update.weight_decay, slice.eps, param_norm, grad_norm);
        used_grad_norms[slice.index] = grad_norm;
        if (skip != nullptr) finish_slice(*skip, is_finite(grad_norm), num_slices);
    }
}

// Reads parameters, momenta and gradients once, writes parameters and momenta once; 1 launch per pair of dtypes.
template <class Param, class Grad>
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<Param, Grad>())
    lars_update_kernel(const LarsRecord* slices, const int64_t* first_chunk, int64_t num_slices,
                       int64_t chunks_per_block, int32_t nesterov, const LarsRate* rates,
                       const SkipState* skip /* may be null */, double* param_norms_after, double* chunk_sums,
                       uint32_t* num_finished) {
    const bool is_skipped = skip != nullptr && skip->is_skipped != 0;
#pragma unroll 1
    for (ChunkWalk walk = walk_chunks(first_chunk, num_slices, chunks_per_block); walk.has_chunk(); walk.advance()) {
        const LarsRecord slice = slices[walk.slice];
        if (is_skipped) {
            if (walk.is_first_of_slice() && threadIdx.x == 0) {
                param_norms_after[slice.index] = rates[walk.slice].param_norm;
            }
            walk.skip_rest_of_slice();
            continue;
        }
        const Chunk chunk = walk.in_slice(slice.update.size);
        const auto updated =
            update_chunk<SumOf::kParams, Param, Grad>(slice.update, chunk, rates[walk.slice].local_rate, nesterov != 0);
        double sums[1] = {checked_block_sum(updated.squares, updated.params, static_cast<int>(chunk.size))};
        if (finish_chunk(walk, sums, chunk_sums, num_finished) && threadIdx.x == 0) {
            param_norms_after[slice.index] = sqrt(sums[0]);
        }
    }
}

}  // namespace jointspar
