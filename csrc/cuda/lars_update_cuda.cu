#include <optional>

#include "common/visit_dtype.h"
#include "cuda/chunk_table.h"
#include "cuda/lars_update_kernel.cuh"
#include "cuda/launch.cuh"
#include "cuda/workspace.h"
#include "jointspar/lars_update.h"

namespace jointspar {
namespace {

using LarsTable = ChunkTable<LarsRecord>;

LarsTable table_of(const LarsTensor* tensors, int64_t num_tensors) {
    LarsTable table(num_tensors);
    for (int64_t k = 0; k < num_tensors; ++k) {
        const LarsTensor& tensor = tensors[k];
        const UpdateTensor& update = tensor.update;
        const auto grad_dtype = update.grad == nullptr ? std::nullopt : std::optional(update.grad_dtype);
        table.add({update, k, tensor.trust_coefficient, tensor.eps, tensor.adapt ? 1 : 0}, update.size,
                  update.param_dtype, grad_dtype);
    }
    table.finish();
    return table;
}

// What the first launch leaves for the second, and where both form sums: [rates][chunk sums, two per chunk].
struct LarsScratch {
    LarsRate* rates;
    double* chunk_sums;
};
constexpr int64_t kDoublesPerRate = sizeof(LarsRate) / sizeof(double);

int64_t num_scratch_doubles(const LarsTable& table) {
    return kDoublesPerRate * table.num_slices() + 2 * table.num_chunks();
}

LarsScratch scratch_of(const LarsTable& table, const Workspace& workspace) {
    return {reinterpret_cast<LarsRate*>(workspace->doubles), workspace->doubles + kDoublesPerRate * table.num_slices()};
}

// Where the caller passes norms, most of them are known, and blocks that take several chunks step over a known slice at
// once. How many norms are NaN only the device can see.
int64_t max_rate_blocks(const Workspace& workspace, bool may_be_known) {
    constexpr int64_t kBlocksPerMultiprocessor = 16;
    return may_be_known ? kBlocksPerMultiprocessor * workspace.num_multiprocessors() : kMaxBlocks;
}

}  // namespace

void lars_update_cuda(const LarsTensor* tensors, int64_t num_tensors, const LarsOptions& options,
                      const double* param_norms, const double* grad_norms, double* used_grad_norms,
                      double* param_norms_after, const DeviceQueue& queue) {
    if (num_tensors == 0) return;
    const DeviceGuard guard(queue);
    const LarsTable table = table_of(tensors, num_tensors);
    const Workspace workspace(queue, Operation::kLarsUpdate, table.bytes(), {num_tensors, num_scratch_doubles(table)});
    const LarsScratch scratch = scratch_of(table, workspace);
    SkipState* skip = options.skip_nonfinite ? workspace->skip : nullptr;

    const SliceGroup all = table.all();
    const GridShape grid = table.grid(all, max_rate_blocks(workspace, param_norms != nullptr && grad_norms != nullptr));
    launch("lars_rates_kernel", &lars_rates_kernel, grid.num_blocks, queue, table.records(workspace->table, all),
           table.first_chunk(workspace->table, all), num_tensors, grid.chunks_per_block, param_norms, grad_norms,
           used_grad_norms, scratch.rates, skip, scratch.chunk_sums, workspace->num_finished);

    for (const SliceGroup& group : table.groups()) {
        const GridShape group_grid = table.grid(group);
        visit_dtype(group.left, [&](auto param) {
            visit_dtype(group.right, [&](auto grad) {
                launch("lars_update_kernel", &lars_update_kernel<decltype(param), decltype(grad)>,
                       group_grid.num_blocks, queue, table.records(workspace->table, group),
                       table.first_chunk(workspace->table, group), group.end - group.begin, group_grid.chunks_per_block,
                       options.nesterov, scratch.rates + group.begin, skip, param_norms_after, scratch.chunk_sums,
                       workspace->num_finished);
            });
        });
    }
}

}  // namespace jointspar
