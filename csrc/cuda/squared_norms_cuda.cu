#include <optional>

#include "cuda/chunk_table.h"
#include "cuda/launch.cuh"
#include "cuda/squared_norms_kernel.cuh"
#include "cuda/workspace.h"
#include "jointspar/squared_norms.h"

namespace jointspar {

void squared_norms_cuda(const NormSlice* slices, int64_t num_slices, double* squared_norms, const DeviceQueue& queue) {
    if (num_slices == 0) return;
    const DeviceGuard guard(queue);
    ChunkTable<NormRecord> table(num_slices);
    for (int64_t k = 0; k < num_slices; ++k) {
        const NormSlice& slice = slices[k];
        table.add({slice.source, slice.size, k, slice.source_dtype, 0}, slice.size, slice.source_dtype, std::nullopt);
    }
    table.finish();
    const Workspace workspace(queue, Operation::kSquaredNorms, table.bytes(), {num_slices, table.num_chunks()});
    const SliceGroup all = table.all();
    const GridShape grid = table.grid(all);
    constexpr int32_t kIsRoot = 0;
    launch("squared_norms_kernel", &squared_norms_kernel<NormRecord>, grid.num_blocks, queue,
           table.records(workspace->table, all), table.first_chunk(workspace->table, all), num_slices,
           grid.chunks_per_block, kIsRoot, squared_norms, nullptr, workspace->doubles, workspace->num_finished);
}

}  // namespace jointspar
