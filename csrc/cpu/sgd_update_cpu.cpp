#include "jointspar/sgd_update.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/update_chunk.h"
#include "jointspar/squared_norms.h"

namespace jointspar {

namespace {

bool all_finite(const UpdateTensor* tensors, int64_t num_tensors, double* grad_norms) {
    std::vector<NormSlice> slices;
    slices.reserve(static_cast<std::size_t>(num_tensors));
    for (int64_t k = 0; k < num_tensors; ++k) {
        const UpdateTensor& tensor = tensors[k];
        slices.push_back({tensor.grad, tensor.grad_dtype, tensor.grad == nullptr ? 0 : tensor.size});
    }
    std::vector<double> squared_norms(slices.size());
    squared_norms_cpu(slices.data(), num_tensors, squared_norms.data());
    for (std::size_t k = 0; grad_norms != nullptr && k < slices.size(); ++k)
        grad_norms[k] = std::sqrt(squared_norms[k]);
    return std::all_of(squared_norms.begin(), squared_norms.end(), [](double value) { return std::isfinite(value); });
}

}  // namespace

void sgd_update_cpu(const UpdateTensor* tensors, int64_t num_tensors, bool nesterov, bool skip_nonfinite,
                    double* grad_norms) {
    constexpr double kLocalRate = 1.0;
    if (skip_nonfinite && !all_finite(tensors, num_tensors, grad_norms)) return;
    const LayerTable table(tensors, num_tensors, [](const UpdateTensor& tensor) { return tensor.size; });
    std::vector<double> chunk_sums(static_cast<std::size_t>(table.num_chunks()));
    double* const sums = chunk_sums.data();
    for_each_chunk(table, [=](int64_t index, const Chunk& chunk) {
        sums[index] = update_chunk(tensors[chunk.slice], chunk.begin, chunk.size, kLocalRate, nesterov, true).grads;
    });
    if (grad_norms == nullptr) return;
    for (int64_t k = 0; k < num_tensors; ++k) grad_norms[k] = std::sqrt(table.sum_of(k, sums));
}

}  // namespace jointspar
