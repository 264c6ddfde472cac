#include "cpu/norm_chunk.h"

#include "cpu/half_floats.h"
#include "cpu/simd.h"

namespace jointspar {
namespace {

template <class T>
JOINTSPAR_INLINE double sum_of_squares(const T* values, int64_t size) {
    using Acc = accumulator_t<T>;
    SquareLanes<Acc> squares{};
    for_each_lane<SquareLanes<Acc>::kLanes>(size, [&](int64_t i, int lane) JOINTSPAR_INLINE_LAMBDA {
        const Acc value = convert<Acc>(values[i]);
        squares.lanes[lane] += value * value;
    });
    return checked_total(squares, values, size);
}

JOINTSPAR_SIMD_CLONES double norm_chunk_simd(const void* source, DType dtype, int64_t begin, int64_t size) {
    return visit_dtype(dtype, [&](auto tag) JOINTSPAR_INLINE_LAMBDA {
        return sum_of_squares(static_cast<const decltype(tag)*>(source) + begin, size);
    });
}

}  // namespace

double norm_chunk(const void* source, DType dtype, int64_t begin, int64_t size) {
    if (dtype == DType::kFloat16 && has_half_conversions()) {
        const float* floats = staged_floats(static_cast<const Float16*>(source) + begin, size, 0);
        return norm_chunk_simd(floats, DType::kFloat32, 0, size);
    }
    return norm_chunk_simd(source, dtype, begin, size);
}

}  // namespace jointspar
