// The draw of the active layers by blocks of threads: no sort, no scratch outside of the block, the same bits as the
// walk in sorted order. Block: see block.h.
#pragma once

#include "common/block.h"
#include "common/draw_math.h"

namespace jointspar {

constexpr int kDrawTileSize = 1024;
constexpr int kDrawLayersPerBlock = 32;  // one warp reads the same entry of a tile at a time
constexpr int kDrawSlices = 8;           // warps of a block, each with every eighth entry of a tile
constexpr int kDrawThreads = kDrawLayersPerBlock * kDrawSlices;

// Shared memory of a block.
struct DrawTile {
    uint64_t keys[kDrawTileSize];
    uint64_t fixed_p[kDrawTileSize];
    uint64_t sums[kDrawSlices][kDrawLayersPerBlock];
};

// pi(rank) in a stratified draw, worked out by the whole block; 0 else.
template <class Block>
JOINTSPAR_DEVICE JOINTSPAR_INLINE uint32_t rank_position(const Block& block, const RandomBits& random,
                                                         bool is_stratified, uint32_t rank, uint32_t world_size) {
    if (!is_stratified) return 0;
    const auto first = static_cast<uint32_t>(block.thread());
    const auto stride = static_cast<uint32_t>(block.num_threads());
    return block.reduce(random.num_ranks_before(rank, world_size, first, stride), Add());
}

template <class Block>
JOINTSPAR_DEVICE JOINTSPAR_INLINE void load_tile(const Block& block, DrawTile& tile, const double* probabilities,
                                                 int64_t begin, int64_t size, const RandomBits& random) {
    block.sync();  // the tile before may still be in use
    for (int64_t i = block.thread(); i < size; i += block.num_threads()) {
        tile.keys[i] = random.layer_key(begin + i);
        tile.fixed_p[i] = fixed_probability(probabilities[begin + i]);
    }
    block.sync();
}

// Each block draws kDrawLayersPerBlock layers with kDrawThreads threads. What the running sum holds before a layer is
// the sum over all layers that come before it, in whatever order they are added up: fixed point is exact.
template <class Block>
JOINTSPAR_DEVICE JOINTSPAR_INLINE void draw_systematic_block(const Block& block, DrawTile& tile,
                                                             const double* probabilities, int64_t num_layers,
                                                             const RandomBits& random, bool is_stratified,
                                                             uint32_t rank, uint32_t world_size, uint8_t* active) {
    const uint32_t position = rank_position(block, random, is_stratified, rank, world_size);
    const int column = block.thread() % kDrawLayersPerBlock;
    const int slice = block.thread() / kDrawLayersPerBlock;
    const int64_t layer = block.index() * kDrawLayersPerBlock + column;
    const uint64_t key = random.layer_key(layer);
    uint64_t sum = 0;
    for (int64_t begin = 0; begin < num_layers; begin += kDrawTileSize) {
        const int64_t rest = num_layers - begin;
        const int64_t size = rest < kDrawTileSize ? rest : kDrawTileSize;
        load_tile(block, tile, probabilities, begin, size, random);
        for (int64_t i = slice; i < size; i += kDrawSlices) {
            if (comes_before(tile.keys[i], begin + i, key, layer)) sum += tile.fixed_p[i];
        }
    }
    tile.sums[slice][column] = sum;
    block.sync();
    if (slice != 0 || layer >= num_layers) return;
    sum = random.systematic_offset(position, world_size);
    for (int other = 0; other < kDrawSlices; ++other) sum += tile.sums[other][column];
    active[layer] = crosses_integer(sum, fixed_probability(probabilities[layer]));
}

// One thread per layer.
template <class Block>
JOINTSPAR_DEVICE JOINTSPAR_INLINE void draw_bernoulli_block(const Block& block, const double* probabilities,
                                                            int64_t num_layers, const RandomBits& random,
                                                            bool is_stratified, uint32_t rank, uint32_t world_size,
                                                            uint8_t* active) {
    const uint32_t position = rank_position(block, random, is_stratified, rank, world_size);
    const int64_t layer = block.index() * block.num_threads() + block.thread();
    if (layer >= num_layers) return;
    const double p = probabilities[layer];
    active[layer] = is_stratified ? takes_stratified_bernoulli(random, layer, p, position, world_size)
                                  : takes_bernoulli(random, layer, p);
}

}  // namespace jointspar
