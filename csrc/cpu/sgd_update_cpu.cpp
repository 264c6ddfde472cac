#include "jointspar/sgd_update.h"

#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/update_chunk.h"

namespace jointspar {

void sgd_update_cpu(const UpdateTensor* tensors, std::int64_t num_tensors, bool nesterov, double* grad_norms) {
    constexpr double kLocalRate = 1.0;
    const LayerTable table(tensors, num_tensors, [](const UpdateTensor& tensor) { return tensor.size; });
    std::vector<double> chunk_sums(static_cast<std::size_t>(table.num_chunks()));
    double* const sums = chunk_sums.data();
    for_each_chunk(table, [=](int64_t index, const Chunk& chunk) {
        sums[index] = update_chunk(tensors[chunk.slice], chunk.begin, chunk.size, kLocalRate, nesterov).grads;
    });
    if (grad_norms == nullptr) return;
    for (int64_t k = 0; k < num_tensors; ++k) grad_norms[k] = std::sqrt(table.sum_of(k, sums));
}

}  // namespace jointspar
