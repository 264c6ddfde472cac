// When a kernel runs on several OpenMP threads, and how chunks are spread over them: contiguous ranges of about equal
// numbers of elements.
#pragma once

#include <omp.h>

#include "common/layer_table.h"
#include "cpu/non_temporal.h"

namespace jointspar {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 65536;

// Whether so many elements are worth several threads. Never in a process that was forked after kernels had run on
// several: they are the parent's, and the child would wait for them for ever. Nobody tells of threads that only torch
// has used; torch's own operations would wait for them as well.
bool is_parallel(int64_t num_elements);

// Calls visit(chunk_index, chunk) for this thread's share of the chunks of slices [slice_begin, slice_end).
// Called by all threads of a parallel region, or outside of one.
template <class Visit>
void for_each_own_chunk(const LayerTable& table, int64_t slice_begin, int64_t slice_end, Visit visit) {
    const int64_t thread = omp_get_thread_num();
    const int64_t num_threads = omp_get_num_threads();
    const int64_t first = table.first_element(slice_begin);
    const int64_t count = table.first_element(slice_end) - first;
    const int64_t begin = table.chunk_at_or_after(first + count * thread / num_threads);
    const int64_t end = table.chunk_at_or_after(first + count * (thread + 1) / num_threads);
    if (begin >= end) return;
    Chunk chunk = table.locate(begin);
    for (int64_t index = begin; index < end; ++index) {
        while (index == table.first_chunk(chunk.slice + 1)) ++chunk.slice;
        chunk.begin = (index - table.first_chunk(chunk.slice)) * kChunkSize;
        chunk.size = table.size(chunk.slice) - chunk.begin;
        if (chunk.size > kChunkSize) chunk.size = kChunkSize;
        visit(index, chunk);
    }
}

// All chunks of the table, by all threads when there is enough work. visit must not throw; it may write around the
// cache.
template <class Visit>
void for_each_chunk(const LayerTable& table, Visit visit) {
#pragma omp parallel if (is_parallel(table.num_elements()))
    {
        for_each_own_chunk(table, 0, table.num_slices(), visit);
        finish_non_temporal();
    }
}

}  // namespace jointspar
