#include <optional>

#include "common/visit_dtype.h"
#include "cuda/chunk_table.h"
#include "cuda/launch.cuh"
#include "cuda/pack_kernel.cuh"
#include "cuda/workspace.h"
#include "jointspar/pack_gradients.h"

namespace jointspar {
namespace {

ChunkTable<PackRecord> table_of(const PackSlice* slices, int64_t num_slices, DType packed_dtype) {
    ChunkTable<PackRecord> table(num_slices);
    for (int64_t k = 0; k < num_slices; ++k) {
        const PackSlice& slice = slices[k];
        const auto source_dtype = slice.source == nullptr ? std::nullopt : std::optional(slice.source_dtype);
        table.add({slice.source, slice.offset, slice.size, k, slice.scale}, slice.size, source_dtype, packed_dtype);
    }
    table.finish();
    return table;
}

}  // namespace

void pack_gradients_cuda(const PackSlice* slices, int64_t num_slices, void* packed, DType packed_dtype,
                         double* squared_norms, const DeviceQueue& queue) {
    if (num_slices == 0) return;
    const DeviceGuard guard(queue);
    const ChunkTable<PackRecord> table = table_of(slices, num_slices, packed_dtype);
    const Workspace workspace(queue, Operation::kPack, table.bytes(), {num_slices, table.num_chunks()});
    for (const SliceGroup& group : table.groups()) {
        const GridShape grid = table.grid(group);
        visit_dtype(group.left, [&](auto source) {
            visit_dtype(group.right, [&](auto target) {
                using Packed = decltype(target);
                launch("pack_gradients_kernel", &pack_gradients_kernel<decltype(source), Packed>, grid.num_blocks,
                       queue, table.records(workspace->table, group), table.first_chunk(workspace->table, group),
                       group.end - group.begin, grid.chunks_per_block, static_cast<Packed*>(packed), squared_norms,
                       workspace->doubles, workspace->num_finished);
            });
        });
    }
}

}  // namespace jointspar
