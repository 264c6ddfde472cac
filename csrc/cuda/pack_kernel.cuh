// pack_gradients on the device. Contract: jointspar/pack_gradients.h; launching: chunk_walk.cuh. NVRTC reads this.
#pragma once

#include "cuda/chunk_sums.cuh"
#include "cuda/chunk_walk.cuh"

namespace jointspar {

struct PackRecord {
    const void* source;  // null: zeros
    int64_t offset;      // elements
    int64_t size;
    int64_t index;  // in squared_norms
    double scale;
};

template <class Source, class Packed>
struct PackOp {
    using Acc = accumulator_t<Source>;
    using Product = accumulator_t<Source, Packed>;
    static constexpr int kWidth = vector_width<Source, Packed>();
    static constexpr int kUnroll = unrolled(4, kWidth);
    static constexpr int kUnrollSingle = 8;
    template <int kCount>
    using Loaded = Vector<Source, kCount>;

    const Source* source;
    Packed* packed;
    Product scale;
    Acc squares;

    __device__ JOINTSPAR_INLINE bool is_aligned() const {
        return jointspar::is_aligned<kWidth>(source) && jointspar::is_aligned<kWidth>(packed);
    }
    // A gradient is not read again once it is packed; packed is what the exchange reads next.
    template <int kCount>
    __device__ JOINTSPAR_INLINE Loaded<kCount> load(int at) const {
        if (source == nullptr) return {};
        return load_vector<kCount, Reuse::kNone>(source + at);
    }
    template <int kCount>
    __device__ JOINTSPAR_INLINE void use(int at, const Loaded<kCount>& loaded) {
        Vector<Packed, kCount> products;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const Acc value = convert<Acc>(loaded.elements[i]);
            squares += value * value;
            products.elements[i] = convert<Packed>(static_cast<Product>(value) * scale);
        }
        store_vector<Reuse::kSoon>(packed + at, products);
    }
};

// Reads each source once and writes each element of packed once; 1 launch per pair of dtypes.
template <class Source, class Packed>
__global__ void __launch_bounds__(kThreadsPerBlock, min_blocks<Source, Packed>())
    pack_gradients_kernel(const PackRecord* slices, const int64_t* first_chunk, int64_t num_slices,
                          int64_t chunks_per_block, Packed* packed, double* squared_norms /* may be null */,
                          double* chunk_sums, uint32_t* num_finished) {
    using Op = PackOp<Source, Packed>;
#pragma unroll 1
    for (ChunkWalk walk = walk_chunks(first_chunk, num_slices, chunks_per_block); walk.has_chunk(); walk.advance()) {
        const PackRecord slice = slices[walk.slice];
        const Chunk chunk = walk.in_slice(slice.size);
        const int size = static_cast<int>(chunk.size);
        const Source* source = static_cast<const Source*>(slice.source);
        const bool is_zero = source == nullptr;
        Op op{is_zero ? nullptr : source + chunk.begin, packed + slice.offset + chunk.begin,
              is_zero ? typename Op::Product(1) : static_cast<typename Op::Product>(slice.scale), typename Op::Acc(0)};
        stream_chunk(op, size);
        if (squared_norms == nullptr) continue;
        double sums[1] = {is_zero ? 0.0 : checked_block_sum(op.squares, op.source, size)};
        if (finish_chunk(walk, sums, chunk_sums, num_finished) && threadIdx.x == 0) {
            squared_norms[slice.index] = sums[0];
        }
    }
}

}  // namespace jointspar
