#include "check.h"
#include "common/device_chunks.h"

namespace jointspar {
namespace {

const std::vector<int64_t> kSizes{0, 1, 4095, 4096, 4097, 0, 0, 5 * 4096 + 7, 3, 0};

std::vector<int64_t> first_chunks_of(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> first_chunk{0};
    for (const int64_t size : sizes) first_chunk.push_back(first_chunk.back() + num_device_chunks_of(size));
    return first_chunk;
}

std::vector<int64_t> random_sizes(unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<int64_t> sizes(1 + engine() % 300);
    for (int64_t& size : sizes) size = static_cast<int64_t>(engine() % 4 == 0 ? 0 : engine() % 40000);
    return sizes;
}

int64_t last_not_above_by_warp(const std::vector<int64_t>& starts, int64_t count, int64_t value) {
    WarpSearch search{0, count};
    while (!search.is_done()) {
        int votes = 0;
        for (int lane = 0; lane < kWarpSize; ++lane) votes += search.is_not_above(starts.data(), lane, value) ? 1 : 0;
        search = search.narrowed(votes);
    }
    return search.low;
}

// How often the blocks of a grid visit each element, slice after slice; one more for an empty slice's chunk.
std::vector<int> visits_of(const std::vector<int64_t>& sizes, int64_t max_blocks) {
    const std::vector<int64_t> first_chunk = first_chunks_of(sizes);
    const auto num_slices = static_cast<int64_t>(sizes.size());
    std::vector<int64_t> first_visit{0};
    for (const int64_t size : sizes) first_visit.push_back(first_visit.back() + (size > 0 ? size : 1));
    std::vector<int> visits(static_cast<std::size_t>(first_visit.back()));
    const GridShape grid = grid_of(first_chunk.back(), max_blocks);
    CHECK(grid.num_blocks <= max_blocks);
    for (int64_t block = 0; block < grid.num_blocks; ++block) {
        ChunkWalk walk = chunks_of_block(first_chunk.data(), num_slices, grid.chunks_per_block, block);
        CHECK(walk.has_chunk());
        for (walk.enter(last_not_above_by_warp(first_chunk, num_slices, walk.chunk)); walk.has_chunk();
             walk.advance()) {
            const Chunk chunk = walk.in_slice(sizes[static_cast<std::size_t>(walk.slice)]);
            const int64_t begin = first_visit[static_cast<std::size_t>(walk.slice)] + chunk.begin;
            const int64_t count = chunk.size > 0 ? chunk.size : 1;
            for (int64_t at = begin; at < begin + count; ++at) ++visits[static_cast<std::size_t>(at)];
        }
    }
    return visits;
}

TEST(device_blocks_visit_every_element_once) {
    for (const int64_t max_blocks : {int64_t{1}, int64_t{3}, int64_t{7}, int64_t{1} << 31}) {
        CHECK(visits_of(kSizes, max_blocks) == std::vector<int>(visits_of(kSizes, max_blocks).size(), 1));
    }
    for (unsigned seed = 0; seed < 20; ++seed) {
        const std::vector<int> visits = visits_of(random_sizes(seed), 1 + seed * 37);
        CHECK(visits == std::vector<int>(visits.size(), 1));
    }
}

TEST(empty_slices_own_a_chunk_of_the_device) {
    CHECK(num_device_chunks_of(0) == 1);
    CHECK(num_device_chunks_of(1) == 1);
    CHECK(num_device_chunks_of(4096) == 1);
    CHECK(num_device_chunks_of(4097) == 2);
}

TEST(a_warp_finds_the_last_start_not_above_a_value) {
    for (const int64_t count : {1, 2, 31, 32, 33, 161, 1024, 1025, 40000}) {
        std::vector<int64_t> starts;
        for (int64_t k = 0; k < count; ++k) starts.push_back(3 * k);
        for (int64_t value = 0; value < 3 * count; value += 1 + count / 50) {
            CHECK(last_not_above_by_warp(starts, count, value) == value / 3);
        }
    }
}

TEST(a_walk_can_begin_in_a_part_of_a_longer_table) {
    const std::vector<int64_t> first_chunk = first_chunks_of(kSizes);
    constexpr int64_t kBegin = 4;  // 4097 elements: chunks 4 and 5
    ChunkWalk walk = chunks_of_block(first_chunk.data() + kBegin, 2, 2, 0);
    walk.enter(0);
    CHECK(walk.chunk == 4 && walk.end == 6 && walk.is_first_of_slice() && walk.num_chunks_of_slice() == 2);
    walk.skip_rest_of_slice();
    walk.advance();
    CHECK(!walk.has_chunk());
}

TEST(grids_stay_below_what_a_dimension_allows) {
    const GridShape small = grid_of(10, 100);
    CHECK(small.num_blocks == 10 && small.chunks_per_block == 1);
    const GridShape large = grid_of((int64_t{1} << 33) + 1, (int64_t{1} << 31) - 1);
    CHECK(large.chunks_per_block == 5 && large.num_blocks * 5 >= (int64_t{1} << 33) + 1);
    CHECK(large.num_blocks < (int64_t{1} << 31));
}

TEST(vectors_and_single_elements_share_a_chunk) {
    CHECK(size_by_vectors(4096, 4, true) == 4096);
    CHECK(size_by_vectors(4095, 4, true) == 4092);
    CHECK(size_by_vectors(3, 4, true) == 0);
    CHECK(size_by_vectors(4096, 4, false) == 0);
}

}  // namespace
}  // namespace jointspar
