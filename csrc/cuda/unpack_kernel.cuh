// unpack_gradients and add_packed on the device. Contract: jointspar/unpack_gradients.h; launching: chunk_walk.cuh.
// NVRTC reads this.
#pragma once

#include "cuda/chunk_vectors.cuh"
#include "cuda/chunk_walk.cuh"

namespace jointspar {

struct UnpackRecord {
    void* target;
    int64_t offset;  // elements
    int64_t size;
};

template <class Packed, class Target, bool kAdd>
struct UnpackOp {
    static constexpr int kWidth = vector_width<Packed, Target>();
    static constexpr int kUnroll = unrolled(4, kWidth);
    static constexpr int kUnrollSingle = 8;
    template <int kCount>
    struct Loaded {
        Vector<Packed, kCount> packed;
        Vector<Target, kCount> target;  // kAdd alone
    };

    const Packed* packed;
    Target* target;

    __device__ JOINTSPAR_INLINE bool is_aligned() const {
        return jointspar::is_aligned<kWidth>(packed) && jointspar::is_aligned<kWidth>(target);
    }
    template <int kCount>
    __device__ JOINTSPAR_INLINE Loaded<kCount> load(int at) const {
        Loaded<kCount> loaded;
        loaded.packed = load_vector<kCount, Reuse::kNone>(packed + at);
        if (kAdd) loaded.target = load_vector<kCount, Reuse::kSoon>(target + at);
        return loaded;
    }
    template <int kCount>
    __device__ JOINTSPAR_INLINE void use(int at, const Loaded<kCount>& loaded) {
        using Acc = accumulator_t<Packed, Target>;
        Vector<Target, kCount> result;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            result.elements[i] =
                kAdd
                    ? convert<Target>(convert<Acc>(loaded.target.elements[i]) + convert<Acc>(loaded.packed.elements[i]))
                    : convert<Target>(loaded.packed.elements[i]);
        }
        store_vector<Reuse::kSoon>(target + at, result);
    }
};

// Touches each element of the slices once; 1 launch per dtype of the targets.
template <class Packed, class Target, bool kAdd>
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<Packed, Target>())
    unpack_gradients_kernel(const UnpackRecord* slices, const int64_t* first_chunk, int64_t num_slices,
                            int64_t chunks_per_block, const Packed* packed) {
#pragma unroll 1
    for (ChunkWalk walk = walk_chunks(first_chunk, num_slices, chunks_per_block); walk.has_chunk(); walk.advance()) {
        const UnpackRecord slice = slices[walk.slice];
        const Chunk chunk = walk.in_slice(slice.size);
        UnpackOp<Packed, Target, kAdd> op{packed + slice.offset + chunk.begin,
                                          static_cast<Target*>(slice.target) + chunk.begin};
        stream_chunk(op, static_cast<int>(chunk.size));
    }
}

// One array without a table: block b adds chunks b * chunks_per_block and on. 1 launch.
template <class T>
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<T>())
    add_packed_kernel(T* sum, const T* packed, int64_t size, int64_t chunks_per_block) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * chunks_per_block;
    for (int64_t number = first; number < first + chunks_per_block; ++number) {
        const Chunk chunk = chunk_of_slice(0, number, size, kDeviceChunkSize);
        if (chunk.size <= 0) return;
        UnpackOp<T, T, true> op{packed + chunk.begin, sum + chunk.begin};
        stream_chunk(op, static_cast<int>(chunk.size));
    }
}

}  // namespace jointspar
