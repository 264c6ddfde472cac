#include "cpu/update_chunk.h"

#include <type_traits>

#include "common/lars_math.h"
#include "cpu/half_floats.h"
#include "cpu/simd.h"
#include "cpu/zero_chunk.h"

namespace jointspar {
namespace {

struct ChunkUpdate {
    void* param;  // the chunk's first element, as the other two
    void* momentum_buffer;
    const void* grad;
    DType param_dtype;
    DType grad_dtype;
    int64_t size;
    UpdateFactors<double> factors;
    bool nesterov;
    bool sums_grads;
};

// `value` as reading it back would give it, in registers: stores and loads of 16 bits would not become vector code.
template <class Param, class Acc>
JOINTSPAR_INLINE Acc as_stored(Acc value) {
    if constexpr (std::is_same_v<Param, BFloat16>) {
        static_assert(std::is_same_v<Acc, float>);
        return bit_cast<float>(round_to_upper_half(value) & 0xFFFF0000u);
    } else {
        return convert<Acc>(convert<Param>(value));
    }
}

template <bool kNesterov, bool kSumsGrads, class Param, class Grad>
JOINTSPAR_INLINE UpdateSums update_values(Param* __restrict params, const Grad* __restrict grads,
                                          const ChunkUpdate& chunk) {
    using Acc = accumulator_t<Param>;
    Acc* __restrict momenta = static_cast<Acc*>(chunk.momentum_buffer);
    const UpdateFactors<Acc> factors{static_cast<Acc>(chunk.factors.lr), static_cast<Acc>(chunk.factors.momentum),
                                     static_cast<Acc>(chunk.factors.weight_decay),
                                     as_finite<Acc>(chunk.factors.local_rate)};
    SquareLanes<Acc> param_squares{};
    SquareLanes<accumulator_t<Grad>> grad_squares{};
    for_each_lane<SquareLanes<Acc>::kLanes>(chunk.size, [&](int64_t i, int lane) JOINTSPAR_INLINE_LAMBDA {
        const auto grad = convert<accumulator_t<Grad>>(grads[i]);
        if constexpr (kSumsGrads) grad_squares.lanes[lane] += grad * grad;
        Acc param = convert<Acc>(params[i]);
        Acc momentum_buffer = momenta[i];
        momentum_step<kNesterov>(param, momentum_buffer, static_cast<Acc>(grad), factors);
        momenta[i] = momentum_buffer;
        params[i] = convert<Param>(param);
        param = as_stored<Param>(param);
        param_squares.lanes[lane] += param * param;
    });
    return {checked_total(param_squares, params, chunk.size),
            kSumsGrads ? checked_total(grad_squares, grads, chunk.size) : 0.0};
}

template <bool kNesterov, bool kSumsGrads>
JOINTSPAR_INLINE UpdateSums update_any(const ChunkUpdate& chunk) {
    return visit_dtype(chunk.param_dtype, [&](auto param) JOINTSPAR_INLINE_LAMBDA {
        return visit_dtype(chunk.grad_dtype, [&](auto grad) JOINTSPAR_INLINE_LAMBDA {
            return update_values<kNesterov, kSumsGrads>(static_cast<decltype(param)*>(chunk.param),
                                                        static_cast<const decltype(grad)*>(chunk.grad), chunk);
        });
    });
}

JOINTSPAR_SIMD_CLONES UpdateSums update_chunk_simd(const ChunkUpdate& chunk) {
    if (chunk.sums_grads) return chunk.nesterov ? update_any<true, true>(chunk) : update_any<false, true>(chunk);
    return chunk.nesterov ? update_any<true, false>(chunk) : update_any<false, false>(chunk);
}

}  // namespace

UpdateSums update_chunk(const UpdateTensor& tensor, int64_t begin, int64_t size, double local_rate, bool nesterov,
                        bool sums_grads) {
    const DType momentum_dtype = tensor.param_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    ChunkUpdate chunk{static_cast<std::byte*>(tensor.param) + begin * element_bytes(tensor.param_dtype),
                      static_cast<std::byte*>(tensor.momentum_buffer) + begin * element_bytes(momentum_dtype),
                      zero_chunk(),
                      tensor.param_dtype,
                      DType::kFloat32,
                      size,
                      {tensor.lr, tensor.momentum, tensor.weight_decay, local_rate},
                      nesterov,
                      sums_grads};
    if (tensor.grad != nullptr) {
        chunk.grad = static_cast<const std::byte*>(tensor.grad) + begin * element_bytes(tensor.grad_dtype);
        chunk.grad_dtype = tensor.grad_dtype;
        if (chunk.grad_dtype == DType::kFloat16 && has_half_conversions()) {
            chunk.grad = staged_floats(chunk.grad, size, 0);
            chunk.grad_dtype = DType::kFloat32;
        }
    }
    return update_chunk_simd(chunk);
}

}  // namespace jointspar
