// Sums of squares, of chunks and from chunks to slices, in a fixed order and without float atomics: the same bits in
// every run. No host code: NVRTC reads this.
#pragma once

#include "common/square_sums.h"
#include "common/visit_dtype.h"
#include "cuda/block_reduce.cuh"
#include "cuda/chunk_vectors.cuh"
#include "cuda/skip_state.h"

namespace jointspar {

template <class T, class Sum>
struct SquareOp {
    static constexpr int kWidth = vector_width<T>();
    static constexpr int kUnroll = unrolled(4, kWidth);
    static constexpr int kUnrollSingle = 8;
    template <int kCount>
    using Loaded = Vector<T, kCount>;

    const T* values;
    Sum squares;

    __device__ JOINTSPAR_INLINE bool is_aligned() const { return jointspar::is_aligned<kWidth>(values); }
    template <int kCount>
    __device__ JOINTSPAR_INLINE Loaded<kCount> load(int at) const {
        return load_vector<kCount, Reuse::kSoon>(values + at);
    }
    template <int kCount>
    __device__ JOINTSPAR_INLINE void use(int, const Loaded<kCount>& loaded) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const Sum value = convert<Sum>(loaded.elements[i]);
            squares += value * value;
        }
    }
};

// Called by all threads of the block, which all get the sum.
template <class Sum, class T>
__device__ JOINTSPAR_INLINE double block_sum_of_squares(const T* values, int size) {
    SquareOp<T, Sum> op{values, Sum(0)};
    stream_chunk(op, size);
    return block_sum(static_cast<double>(op.squares));
}

// The sum over the block of what each thread squared and added of `values` on its way. Where float sums left the
// trusted range they are formed again in double: NaN and Inf then come from the data alone.
template <class T, class Acc>
__device__ JOINTSPAR_INLINE double checked_block_sum(Acc squares_of_thread, const T* values, int size) {
    const double sum = block_sum(static_cast<double>(squares_of_thread));
    if (sizeof(Acc) == sizeof(double) || is_trusted_sum(sum)) return sum;
    return block_sum_of_squares<double>(values, size);
}

// For visit_dtype; NVRTC takes no generic lambda.
struct NormOfChunk {
    const void* source;
    Chunk chunk;

    template <class T>
    __device__ JOINTSPAR_INLINE double operator()(T) const {
        const T* values = static_cast<const T*>(source) + chunk.begin;
        const int size = static_cast<int>(chunk.size);
        SquareOp<T, accumulator_t<T>> op{values, 0};
        stream_chunk(op, size);
        return checked_block_sum(op.squares, values, size);
    }
};

// The sum of squares of a chunk of an array, for all threads of the block.
__device__ JOINTSPAR_INLINE double norm_of_chunk(const void* source, DType dtype, const Chunk& chunk) {
    return visit_dtype(dtype, NormOfChunk{source, chunk});
}

// The count before; who reads the new count by an atomic also sees what this thread wrote before. Unlike
// __threadfence(), it does not empty the multiprocessor's first-level cache, where the tables are.
__device__ JOINTSPAR_INLINE uint32_t add_one_released(uint32_t* count) {
#if defined(__CUDA_ARCH__)
    uint32_t before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    return before;
#else
    return atomicAdd(count, 1u);
#endif
}

// Called by all threads with the sums of the walk's chunk. True in one block for each slice, the one that finishes its
// last chunk: there `sums` have become the slice's, for all threads.
//   chunk_sums    [kNumSums * number of chunks]; num_finished [num_slices], zeros, left as zeros
template <int kNumSums>
__device__ JOINTSPAR_INLINE bool finish_chunk(const ChunkWalk& walk, double (&sums)[kNumSums], double* chunk_sums,
                                              uint32_t* num_finished) {
    if (walk.num_chunks_of_slice() == 1) return true;
    bool is_last = false;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int n = 0; n < kNumSums; ++n) chunk_sums[walk.chunk * kNumSums + n] = sums[n];
        is_last = add_one_released(&num_finished[walk.slice]) + 1 == walk.num_chunks_of_slice();
        if (is_last) __threadfence();  // ahead of the barrier: all threads behind it see what the other blocks wrote
    }
    if (!__syncthreads_or(is_last)) return false;
#pragma unroll
    for (int n = 0; n < kNumSums; ++n) {
        double sum = 0.0;
#pragma unroll 1
        for (int64_t chunk = walk.slice_begin + static_cast<int64_t>(threadIdx.x); chunk < walk.slice_end;
             chunk += kThreadsPerBlock) {
            sum += __ldcg(&chunk_sums[chunk * kNumSums + n]);  // from L2, where the other blocks' stores went
        }
        sums[n] = block_sum(sum);
    }
    if (threadIdx.x == 0) num_finished[walk.slice] = 0;
    return true;
}

// One thread calls it once for each slice of a launch. The last one decides for all.
__device__ JOINTSPAR_INLINE void finish_slice(SkipState& state, bool has_finite_norm, int64_t num_slices) {
    if (!has_finite_norm) atomicAdd(&state.num_nonfinite, 1u);
    if (add_one_released(&state.num_finished) + 1 != num_slices) return;
    __threadfence();
    state.is_skipped = atomicExch(&state.num_nonfinite, 0u) != 0 ? 1 : 0;
    state.num_finished = 0;
}

}  // namespace jointspar
