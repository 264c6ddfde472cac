// One chunk of a parameter update: what lars_update and sgd_update share. No host code: NVRTC reads this.
#pragma once

#include "common/lars_math.h"
#include "cuda/chunk_sums.cuh"
#include "jointspar/types.h"

namespace jointspar {

enum class SumOf { kParams, kGrads };

// The accumulator of what is summed.
template <SumOf kSum, class Param, class Grad>
struct Summed {
    using type = accumulator_t<Param>;
};
template <class Param, class Grad>
struct Summed<SumOf::kGrads, Param, Grad> {
    using type = accumulator_t<Grad>;
};

template <class Param, class Grad, SumOf kSum>
struct UpdateOp {
    using Acc = accumulator_t<Param>;
    using GradAcc = accumulator_t<Grad>;
    using Sum = typename Summed<kSum, Param, Grad>::type;
    static constexpr int kWidth = vector_width<Param, Acc, Grad>();
    static constexpr int kUnroll = unrolled(2, kWidth);  // six loads of up to 16 bytes under way
    static constexpr int kUnrollSingle = 4;
    template <int kCount>
    struct Loaded {
        Vector<Param, kCount> params;
        Vector<Acc, kCount> momenta;
        Vector<Grad, kCount> grads;
    };

    Param* params;
    Acc* momenta;
    const Grad* grads;  // null: zeros
    UpdateFactors<Acc> factors;
    bool nesterov;
    Sum squares;

    __device__ JOINTSPAR_INLINE bool is_aligned() const {
        return jointspar::is_aligned<kWidth>(params) && jointspar::is_aligned<kWidth>(momenta) &&
               jointspar::is_aligned<kWidth>(grads);
    }
    // The next forward pass reads the parameters; momenta and gradients are done for this step.
    template <int kCount>
    __device__ JOINTSPAR_INLINE Loaded<kCount> load(int at) const {
        Loaded<kCount> loaded;
        loaded.params = load_vector<kCount, Reuse::kSoon>(params + at);
        loaded.momenta = load_vector<kCount, Reuse::kNone>(momenta + at);
        loaded.grads = Vector<Grad, kCount>{};
        if (grads != nullptr) loaded.grads = load_vector<kCount, Reuse::kNone>(grads + at);
        return loaded;
    }
    template <int kCount>
    __device__ JOINTSPAR_INLINE void use(int at, const Loaded<kCount>& loaded) {
        Vector<Param, kCount> new_params;
        Vector<Acc, kCount> new_momenta;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const GradAcc grad = convert<GradAcc>(loaded.grads.elements[i]);
            Acc param = convert<Acc>(loaded.params.elements[i]);
            Acc momentum_buffer = loaded.momenta.elements[i];
            if (nesterov) {
                momentum_step<true>(param, momentum_buffer, static_cast<Acc>(grad), factors);
            } else {
                momentum_step<false>(param, momentum_buffer, static_cast<Acc>(grad), factors);
            }
            new_momenta.elements[i] = momentum_buffer;
            new_params.elements[i] = convert<Param>(param);
            add_square(grad, new_params.elements[i]);
        }
        store_vector<Reuse::kNone>(momenta + at, new_momenta);
        store_vector<Reuse::kSoon>(params + at, new_params);
    }
    __device__ JOINTSPAR_INLINE void add_square(GradAcc grad, Param param) {
        if constexpr (kSum == SumOf::kParams) {
            squares += convert<Sum>(param) * convert<Sum>(param);
        } else {
            squares += grad * grad;
        }
    }
};

// Updates a chunk of a tensor by all threads of the block; each element is read and written once. What it returns has
// this thread's squares.
template <SumOf kSum, class Param, class Grad>
__device__ JOINTSPAR_INLINE UpdateOp<Param, Grad, kSum> update_chunk(const UpdateTensor& tensor, const Chunk& chunk,
                                                                     double local_rate, bool nesterov) {
    using Op = UpdateOp<Param, Grad, kSum>;
    using Acc = typename Op::Acc;
    const Grad* grads = static_cast<const Grad*>(tensor.grad);
    Op op{static_cast<Param*>(tensor.param) + chunk.begin,
          static_cast<Acc*>(tensor.momentum_buffer) + chunk.begin,
          grads == nullptr ? nullptr : grads + chunk.begin,
          {static_cast<Acc>(tensor.lr), static_cast<Acc>(tensor.momentum), static_cast<Acc>(tensor.weight_decay),
           as_finite<Acc>(local_rate)},
          nesterov,
          typename Op::Sum(0)};
    stream_chunk(op, static_cast<int>(chunk.size));
    return op;
}

}  // namespace jointspar
