#include "common/visit_dtype.h"
#include "cuda/chunk_table.h"
#include "cuda/launch.cuh"
#include "cuda/unpack_kernel.cuh"
#include "cuda/workspace.h"
#include "jointspar/unpack_gradients.h"

namespace jointspar {
namespace {

ChunkTable<UnpackRecord> table_of(const UnpackSlice* slices, int64_t num_slices, DType packed_dtype) {
    ChunkTable<UnpackRecord> table(num_slices);
    for (int64_t k = 0; k < num_slices; ++k) {
        const UnpackSlice& slice = slices[k];
        table.add({slice.target, slice.offset, slice.size}, slice.size, packed_dtype, slice.target_dtype);
    }
    table.finish();
    return table;
}

}  // namespace

void unpack_gradients_cuda(const void* packed, DType packed_dtype, const UnpackSlice* slices, int64_t num_slices,
                           bool add, const DeviceQueue& queue) {
    if (num_slices == 0) return;
    const DeviceGuard guard(queue);
    const ChunkTable<UnpackRecord> table = table_of(slices, num_slices, packed_dtype);
    const Workspace workspace(queue, Operation::kUnpack, table.bytes(), {0, 0});
    for (const SliceGroup& group : table.groups()) {
        const GridShape grid = table.grid(group);
        visit_dtype(group.left, [&](auto source) {
            visit_dtype(group.right, [&](auto target) {
                using Packed = decltype(source);
                using Target = decltype(target);
                launch("unpack_gradients_kernel",
                       add ? &unpack_gradients_kernel<Packed, Target, true>
                           : &unpack_gradients_kernel<Packed, Target, false>,
                       grid.num_blocks, queue, table.records(workspace->table, group),
                       table.first_chunk(workspace->table, group), group.end - group.begin, grid.chunks_per_block,
                       static_cast<const Packed*>(packed));
            });
        });
    }
}

void add_packed_cuda(void* sum, const void* packed, DType dtype, int64_t size, const DeviceQueue& queue) {
    if (size == 0) return;
    const DeviceGuard guard(queue);
    const RelaxedCapture relaxed;
    const GridShape grid = grid_of(num_device_chunks_of(size), kMaxBlocks);
    visit_dtype(dtype, [&](auto tag) {
        using T = decltype(tag);
        launch("add_packed_kernel", &add_packed_kernel<T>, grid.num_blocks, queue, static_cast<T*>(sum),
               static_cast<const T*>(packed), size, grid.chunks_per_block);
    });
}

}  // namespace jointspar
