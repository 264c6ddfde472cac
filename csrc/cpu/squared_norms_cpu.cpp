#include "jointspar/squared_norms.h"

#include <vector>

#include "cpu/norm_chunk.h"
#include "cpu/parallel.h"

namespace jointspar {

void squared_norms_cpu(const NormSlice* slices, std::int64_t num_slices, double* squared_norms) {
    const LayerTable table(slices, num_slices, [](const NormSlice& slice) { return slice.size; });
    std::vector<double> chunk_sums(static_cast<std::size_t>(table.num_chunks()));
    double* const sums = chunk_sums.data();
    for_each_chunk(table, [=](int64_t index, const Chunk& chunk) {
        const NormSlice& slice = slices[chunk.slice];
        sums[index] = norm_chunk(slice.source, slice.source_dtype, chunk.begin, chunk.size);
    });
    for (int64_t k = 0; k < num_slices; ++k) squared_norms[k] = table.sum_of(k, sums);
}

}  // namespace jointspar
