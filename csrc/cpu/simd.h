// What the streaming kernels share: instruction sets, dtype dispatch, sums of squares, non-temporal stores.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cstddef>

#include "common/float16.h"
#include "jointspar/types.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// A function so marked is compiled for AVX2 and for the baseline, and the loader picks one. Everything hot must be
// inlined into it. Neither version contracts a * b + c (-ffp-contract=off), so both give the same bits.
#if defined(__x86_64__) && defined(__linux__) && !defined(JOINTSPAR_NO_CLONES)
#define JOINTSPAR_SIMD_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define JOINTSPAR_SIMD_CLONES
#endif
#define JOINTSPAR_INLINE_LAMBDA __attribute__((always_inline))

namespace jointspar {

// Calls visit with a value of the element type.
template <class Visit>
JOINTSPAR_INLINE auto visit_dtype(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::kFloat64:
            return visit(double{});
        case DType::kBFloat16:
            return visit(BFloat16{});
        case DType::kFloat16:
            return visit(Float16{});
        case DType::kFloat32:
        default:
            return visit(float{});
    }
}

// A sum of squares in kLanes independent lanes: element i of a chunk belongs to lane i % kLanes in every kernel, so
// all kernels find the same bits for the same data.
template <class Acc>
struct SquareLanes {
    static constexpr int kLanes = 32;
    Acc lanes[kLanes] = {};

    JOINTSPAR_INLINE double total() const {
        double sum = 0.0;
        for (const Acc lane : lanes) sum += static_cast<double>(lane);
        return sum;
    }
};

// Calls visit(element, lane) for element = 0 .. size - 1, in a shape that compilers turn into vector code.
template <int kLanes, class Visit>
JOINTSPAR_INLINE void for_each_lane(int64_t size, Visit visit) {
    int64_t begin = 0;
    for (; begin + kLanes <= size; begin += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) visit(begin + lane, lane);
    }
    for (int lane = 0; begin + lane < size; ++lane) visit(begin + lane, lane);
}

template <class T>
JOINTSPAR_INLINE double sum_of_squares_in_double(const T* values, int64_t size) {
    SquareLanes<double> squares;
    for_each_lane<SquareLanes<double>::kLanes>(size, [&](int64_t i, int lane) JOINTSPAR_INLINE_LAMBDA {
        const double value = convert<double>(values[i]);
        squares.lanes[lane] += value * value;
    });
    return squares.total();
}

// The sum of squares of `values`, given the lanes that a kernel accumulated on its way. Float lanes that overflowed or
// underflowed are summed again in double: NaN and Inf then come from the data alone.
template <class T, class Acc>
JOINTSPAR_INLINE double checked_total(const SquareLanes<Acc>& squares, const T* values, int64_t size) {
    constexpr double kSmallestTrusted = 1e-25;  // kChunkSize squares flushed to zero lose less than 1e-8 of this
    const double sum = squares.total();
    if (sizeof(Acc) == sizeof(double) || (sum >= kSmallestTrusted && sum <= DBL_MAX)) return sum;
    return sum_of_squares_in_double(values, size);
}

// Data beyond the last-level cache is written around it: nobody could read it back from there.
inline bool exceeds_cache(int64_t bytes) {
    static const int64_t cache_bytes = [] {
        constexpr int64_t kAssumedBytes = int64_t{32} << 20;
        const int64_t reported_bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
        return reported_bytes > 0 ? reported_bytes : kAssumedBytes;
    }();
    return bytes > cache_bytes;
}

JOINTSPAR_INLINE void copy_non_temporal(std::byte* target, const std::byte* source, std::size_t num_bytes) {
#if defined(__SSE2__)
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(target) % sizeof(__m128i);
    const std::size_t head = std::min(num_bytes, (sizeof(__m128i) - misaligned) % sizeof(__m128i));
    memcpy(target, source, head);
    std::size_t at = head;
    for (; at + sizeof(__m128i) <= num_bytes; at += sizeof(__m128i)) {
        const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), word);
    }
    memcpy(target + at, source + at, num_bytes - at);
#else
    memcpy(target, source, num_bytes);
#endif
}

// After the last copy_non_temporal of a thread, before others may read.
inline void finish_non_temporal() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Writes target[0 .. size): fill(block, begin, count) computes elements [begin, begin + count) into block. Streaming
// goes through a block in the first-level cache, so that kernels need no second, non-temporal form.
template <class T, class Fill>
JOINTSPAR_INLINE void write_blocks(T* target, int64_t size, bool streaming, Fill fill) {
    constexpr int64_t kBlockSize = 1024;  // a multiple of the lanes: blocks do not disturb the lane of an element
    alignas(64) T staging[kBlockSize];
    for (int64_t begin = 0; begin < size; begin += kBlockSize) {
        const int64_t count = std::min(kBlockSize, size - begin);
        fill(streaming ? staging : target + begin, begin, count);
        if (!streaming) continue;
        copy_non_temporal(reinterpret_cast<std::byte*>(target + begin), reinterpret_cast<const std::byte*>(staging),
                          static_cast<std::size_t>(count) * sizeof(T));
    }
}

}  // namespace jointspar
