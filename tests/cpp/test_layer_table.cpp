#include <omp.h>

#include "check.h"
#include "common/layer_table.h"
#include "cpu/parallel.h"

namespace jointspar {
namespace {

LayerTable table_of(const std::vector<int64_t>& sizes) {
    return LayerTable(sizes.data(), static_cast<int64_t>(sizes.size()), [](int64_t size) { return size; });
}

const std::vector<int64_t> kSizes{0, 1, kChunkSize - 1, kChunkSize, kChunkSize + 1, 0, 0, 5 * kChunkSize + 7, 3, 0};

TEST(chunks_cover_every_element_once_in_order) {
    const LayerTable table = table_of(kSizes);
    std::vector<int64_t> covered(kSizes.size());
    for (int64_t index = 0; index < table.num_chunks(); ++index) {
        const Chunk chunk = table.locate(index);
        CHECK(chunk.size > 0 && chunk.size <= kChunkSize);
        CHECK(chunk.begin == covered[static_cast<std::size_t>(chunk.slice)]);
        covered[static_cast<std::size_t>(chunk.slice)] += chunk.size;
    }
    CHECK(covered == kSizes);
}

TEST(chunk_counts_follow_from_the_sizes_by_hand) {
    const LayerTable table = table_of(kSizes);
    CHECK(table.num_chunks() == 0 + 1 + 1 + 1 + 2 + 0 + 0 + 6 + 1 + 0);
    CHECK(table.first_chunk(4) == 3);
    CHECK(table.first_chunk(7) == 5);
    const Chunk chunk = table.locate(10);
    CHECK(chunk.slice == 7 && chunk.begin == 5 * kChunkSize && chunk.size == 7);
}

TEST(empty_tables_have_no_chunks) {
    CHECK(table_of({}).num_chunks() == 0);
    CHECK(table_of({0, 0}).num_chunks() == 0);
    CHECK(table_of({0, 0}).chunk_at_or_after(0) == 0);
}

TEST(chunk_at_or_after_is_the_next_chunk_start) {
    const LayerTable table = table_of({2 * kChunkSize, 10});
    CHECK(table.chunk_at_or_after(0) == 0);
    CHECK(table.chunk_at_or_after(1) == 1);
    CHECK(table.chunk_at_or_after(kChunkSize) == 1);
    CHECK(table.chunk_at_or_after(kChunkSize + 1) == 2);
    CHECK(table.chunk_at_or_after(2 * kChunkSize) == 2);
    CHECK(table.chunk_at_or_after(2 * kChunkSize + 1) == 3);
    CHECK(table.chunk_at_or_after(2 * kChunkSize + 10) == 3);
}

TEST(threads_share_all_chunks_without_overlap) {
    const LayerTable table = table_of(kSizes);
    for (int num_threads = 1; num_threads <= 7; ++num_threads) {
        std::vector<int> visits(static_cast<std::size_t>(table.num_chunks()));
        int num_wrong = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : num_wrong)
        for_each_own_chunk(table, 0, table.num_slices(), [&](int64_t index, const Chunk& chunk) {
            const Chunk expected = table.locate(index);
            const bool same = chunk.slice == expected.slice && chunk.begin == expected.begin;
            if (!same || chunk.size != expected.size) ++num_wrong;
#pragma omp atomic
            ++visits[static_cast<std::size_t>(index)];
        });
        CHECK(num_wrong == 0);
        CHECK(visits == std::vector<int>(visits.size(), 1));
    }
}

TEST(a_range_of_slices_visits_only_its_chunks) {
    const LayerTable table = table_of(kSizes);
    int64_t count = 0;
    for_each_own_chunk(table, 3, 6, [&](int64_t, const Chunk& chunk) {
        CHECK(chunk.slice >= 3 && chunk.slice < 6);
        ++count;
    });
    CHECK(count == 3);
}

}  // namespace
}  // namespace jointspar
