// Streaming over a chunk: 16-byte accesses where all arrays allow them, else coalesced single elements; several loads
// of a thread are under way before the first result is needed. No host code: NVRTC reads this.
#pragma once

#include "common/device_chunks.h"
#include "common/float16.h"

namespace jointspar {

template <int kBytes>
struct Word;
template <>
struct Word<16> {
    using type = uint4;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<4> {
    using type = unsigned int;
};
template <>
struct Word<2> {
    using type = unsigned short;
};

// kWidth consecutive elements.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
    using word = typename Word<static_cast<int>(sizeof(T)) * kWidth>::type;
    T elements[kWidth];
};

// What caches should do with a line: keep it for who reads it next, or give it up first. Plain accesses would not do:
// the compiler does not know that a table's pointers point to global memory, and it splits copies of unaligned types.
enum class Reuse { kSoon, kNone };

template <int kWidth, Reuse kReuse, class T>
__device__ JOINTSPAR_INLINE Vector<T, kWidth> load_vector(const T* from) {
    using V = Vector<T, kWidth>;
    const auto* word = reinterpret_cast<const typename V::word*>(from);
    if constexpr (kReuse == Reuse::kNone) {
        return bit_cast<V>(__ldcs(word));
    } else {
        return bit_cast<V>(__ldca(word));
    }
}

template <Reuse kReuse, class T, int kWidth>
__device__ JOINTSPAR_INLINE void store_vector(T* to, const Vector<T, kWidth>& vector) {
    using Word = typename Vector<T, kWidth>::word;
    auto* word = reinterpret_cast<Word*>(to);
    if constexpr (kReuse == Reuse::kNone) {
        __stcs(word, bit_cast<Word>(vector));
    } else {
        __stwb(word, bit_cast<Word>(vector));
    }
}

// Elements per vector so that the widest of the types fills 16 bytes; the narrower ones still fill whole sectors.
template <class... T>
JOINTSPAR_HOST_DEVICE constexpr int vector_width() {
    const int sizes[] = {static_cast<int>(sizeof(T))...};
    int largest = 1;
    for (const int size : sizes) largest = size > largest ? size : largest;
    return 16 / largest;
}

// Vectors that a thread loads before it uses the first: as many as asked for, but not more than a chunk has.
JOINTSPAR_HOST_DEVICE constexpr int unrolled(int wanted, int width) {
    const int largest = static_cast<int>(kDeviceChunkSize) / (kThreadsPerBlock * width);
    return wanted < largest ? wanted : largest;
}

template <int kWidth, class T>
__device__ JOINTSPAR_INLINE bool is_aligned(const T* pointer) {
    return reinterpret_cast<unsigned long long>(pointer) % (sizeof(T) * kWidth) == 0;
}

// Elements [begin, end) by vectors of kWidth. Op: kUnroll and kUnrollSingle; Loaded<kWidth> load<kWidth>(at);
// void use<kWidth>(at, loaded), where at is the first element of a vector. Loads are not conditional, since branches
// would come between them: past the end they fetch the last vector once more, and nothing uses it. Single
// elements, which unaligned data are taken by, are small: a thread loads more of them at once.
template <int kWidth, class Op>
__device__ JOINTSPAR_INLINE void stream_vectors(Op& op, int begin, int end) {
    using Vectors = VectorsOfThread<kWidth>;
    constexpr int kUnroll = kWidth == 1 ? Op::kUnrollSingle : Op::kUnroll;
#pragma unroll 1  // more would only cost registers
    for (int first = Vectors::first(begin, static_cast<int>(threadIdx.x)); first < end;
         first += kUnroll * Vectors::kStride) {
        typename Op::template Loaded<kWidth> loaded[kUnroll];
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int at = first + step * Vectors::kStride;
            loaded[step] = op.template load<kWidth>(at < end ? at : end - kWidth);
        }
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
            const int at = first + step * Vectors::kStride;
            if (at < end) op.template use<kWidth>(at, loaded[step]);
        }
    }
}

// A chunk of `size` elements by all threads of the block. Op also has kWidth and is_aligned().
template <class Op>
__device__ JOINTSPAR_INLINE void stream_chunk(Op& op, int size) {
    const int by_vectors = size_by_vectors(size, Op::kWidth, op.is_aligned());
    stream_vectors<Op::kWidth>(op, 0, by_vectors);
    stream_vectors<1>(op, by_vectors, size);
}

}  // namespace jointspar
