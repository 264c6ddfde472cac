// common/block.h on a GPU. No host code: NVRTC reads this.
#pragma once

#include "common/portable.h"
#include "cuda/block_reduce.cuh"

namespace jointspar {

// The value of the lane `distance` away, for any type made of 4-byte words.
template <class T>
__device__ JOINTSPAR_INLINE T shuffle_xor(const T& value, int distance) {
    static_assert(sizeof(T) % sizeof(uint32_t) == 0, "shuffles move words");
    uint32_t words[sizeof(T) / sizeof(uint32_t)];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (uint32_t& word : words) word = __shfl_xor_sync(0xFFFFFFFFu, word, distance);
    T shuffled;
    memcpy(&shuffled, words, sizeof(T));
    return shuffled;
}

// Of each aligned group of `width` lanes, a power of two. Every lane gets it: combine(a, b) equals combine(b, a).
template <class T, class Combine>
__device__ JOINTSPAR_INLINE T combine_lanes(T value, int width, Combine combine) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
        value = combine(value, shuffle_xor(value, distance));
    }
    return value;
}

// One-dimensional; its number of warps is a power of two.
class ThreadBlock {
  public:
    static constexpr int kMaxValueBytes = 32;
    struct Scratch {
        alignas(8) unsigned char bytes[kWarpSize * kMaxValueBytes];
    };

    __device__ explicit ThreadBlock(Scratch& scratch) : scratch_(scratch) {}

    __device__ int64_t index() const { return blockIdx.x; }
    __device__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ int num_threads() const { return static_cast<int>(blockDim.x); }
    __device__ void sync() const { __syncthreads(); }

    // In a fixed order: lanes of a warp, then warps.
    template <class T, class Combine>
    __device__ JOINTSPAR_INLINE T reduce(const T& value, Combine combine) const {
        static_assert(sizeof(T) <= kMaxValueBytes, "scratch is too small");
        T* warp_values = reinterpret_cast<T*>(scratch_.bytes);
        const int lane = thread() % kWarpSize;
        const int num_warps = num_threads() / kWarpSize;
        const T warp_value = combine_lanes(value, kWarpSize, combine);
        __syncthreads();  // values of the reduction before may still be read
        if (lane == 0) warp_values[thread() / kWarpSize] = warp_value;
        __syncthreads();
        return combine_lanes(warp_values[lane % num_warps], num_warps, combine);
    }

  private:
    Scratch& scratch_;
};

}  // namespace jointspar
