// What the streaming kernels share: instruction sets and sums of squares.
#pragma once

#include <cstddef>

#include "common/float16.h"
#include "common/square_sums.h"
#include "common/visit_dtype.h"

// A function so marked is compiled for AVX2 and for the baseline, and the loader picks one (glibc's; musl has none).
// Everything hot must be inlined into it. Neither version contracts a * b + c (-ffp-contract=off), so both give the
// same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(JOINTSPAR_NO_CLONES)
#define JOINTSPAR_SIMD_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define JOINTSPAR_SIMD_CLONES
#endif

namespace jointspar {

// A sum of squares in kLanes independent lanes: element i of a chunk belongs to lane i % kLanes in every kernel, so
// all kernels find the same bits for the same data.
template <class Acc>
struct SquareLanes {
    static constexpr int kLanes = 32;
    Acc lanes[kLanes] = {};

    // Lane 0 of `shift` elements further on: for a kernel that began at element `shift` (non_temporal.h).
    JOINTSPAR_INLINE double total(int64_t shift = 0) const {
        double sum = 0.0;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            sum += static_cast<double>(lanes[(lane - shift) & (kLanes - 1)]);
        }
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
    SquareLanes<double> squares{};  // braces: clang forgets the constructor of what only clones use
    for_each_lane<SquareLanes<double>::kLanes>(size, [&](int64_t i, int lane) JOINTSPAR_INLINE_LAMBDA {
        const double value = convert<double>(values[i]);
        squares.lanes[lane] += value * value;
    });
    return squares.total();
}

// The sum of squares of `values`, given the lanes that a kernel accumulated on its way. Float lanes that overflowed or
// underflowed are summed again in double: NaN and Inf then come from the data alone. `shift` is total's.
template <class T, class Acc>
JOINTSPAR_INLINE double checked_total(const SquareLanes<Acc>& squares, const T* values, int64_t size,
                                      int64_t shift = 0) {
    const double sum = squares.total(shift);
    if (sizeof(Acc) == sizeof(double) || is_trusted_sum(sum)) return sum;
    return sum_of_squares_in_double(values, size);
}

}  // namespace jointspar
