#include <optional>

#include "common/visit_dtype.h"
#include "cuda/chunk_table.h"
#include "cuda/launch.cuh"
#include "cuda/sgd_update_kernel.cuh"
#include "cuda/squared_norms_kernel.cuh"
#include "cuda/workspace.h"
#include "jointspar/sgd_update.h"

namespace jointspar {
namespace {

using SgdTable = ChunkTable<SgdRecord>;

std::optional<DType> grad_dtype_of(const UpdateTensor& tensor) {
    return tensor.grad == nullptr ? std::nullopt : std::optional(tensor.grad_dtype);
}

SgdTable table_of(const UpdateTensor* tensors, int64_t num_tensors) {
    SgdTable table(num_tensors);
    for (int64_t k = 0; k < num_tensors; ++k) {
        const UpdateTensor& tensor = tensors[k];
        table.add({tensor, k}, tensor.size, tensor.param_dtype, grad_dtype_of(tensor));
    }
    table.finish();
    return table;
}

void launch_measurement(const SgdTable& table, const Workspace& workspace, double* grad_norms,
                        const DeviceQueue& queue) {
    const SliceGroup all = table.all();
    const GridShape grid = table.grid(all);
    constexpr int32_t kIsRoot = 1;
    launch("squared_norms_kernel", &squared_norms_kernel<SgdRecord>, grid.num_blocks, queue,
           table.records(workspace->table, all), table.first_chunk(workspace->table, all), table.num_slices(),
           grid.chunks_per_block, kIsRoot, grad_norms, workspace->skip, workspace->doubles, workspace->num_finished);
}

void launch_update(const SgdTable& table, const SliceGroup& group, const Workspace& workspace, bool nesterov,
                   const SkipState* skip, double* grad_norms, const DeviceQueue& queue) {
    const GridShape grid = table.grid(group);
    visit_dtype(group.left, [&](auto param) {
        visit_dtype(group.right, [&](auto grad) {
            using Param = decltype(param);
            using Grad = decltype(grad);
            launch("sgd_update_kernel", &sgd_update_kernel<Param, Grad>, grid.num_blocks, queue,
                   table.records(workspace->table, group), table.first_chunk(workspace->table, group),
                   group.end - group.begin, grid.chunks_per_block, nesterov, skip, grad_norms, workspace->doubles,
                   workspace->num_finished);
        });
    });
}

}  // namespace

void sgd_update_cuda(const UpdateTensor* tensors, int64_t num_tensors, bool nesterov, bool skip_nonfinite,
                     double* grad_norms, const DeviceQueue& queue) {
    if (num_tensors == 0) return;
    const DeviceGuard guard(queue);
    const SgdTable table = table_of(tensors, num_tensors);
    const Workspace workspace(queue, Operation::kSgdUpdate, table.bytes(), {num_tensors, table.num_chunks()});
    if (skip_nonfinite) launch_measurement(table, workspace, grad_norms, queue);
    for (const SliceGroup& group : table.groups()) {
        launch_update(table, group, workspace, nesterov, skip_nonfinite ? workspace->skip : nullptr,
                      skip_nonfinite ? nullptr : grad_norms, queue);
    }
}

}  // namespace jointspar
