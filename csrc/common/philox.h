// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter-based random bits.
// A value depends on (seed, step, rank, layer, purpose) and nothing else, so every device and every resume draws alike.
#pragma once

#include "common/portable.h"

namespace jointspar {

// Fourth word of the counter: what the bits are for. Part of the format of a run; never renumber.
enum class Purpose : uint32_t { kBernoulli = 0, kLayerOrder = 1, kOffset = 2, kRankOrder = 3 };

// Stands in for the rank in draws that all ranks have in common.
constexpr uint32_t kAllRanks = 0xFFFFFFFFu;

struct Philox4x32 {
    uint32_t word[4];
};

JOINTSPAR_HOST_DEVICE inline Philox4x32 philox4x32_10(Philox4x32 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(counter.word[0]) * 0xD2511F53u;
        const uint64_t product1 = static_cast<uint64_t>(counter.word[2]) * 0xCD9E8D57u;
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// 64 random bits: words 0 (low) and 1 (high) of the block at counter (step, rank, index, purpose).
JOINTSPAR_HOST_DEVICE inline uint64_t random_bits(uint64_t seed, uint32_t step, uint32_t rank, uint32_t index,
                                                  Purpose purpose) {
    const Philox4x32 block = philox4x32_10({{step, rank, index, static_cast<uint32_t>(purpose)}},
                                           static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return block.word[0] | static_cast<uint64_t>(block.word[1]) << 32;
}

}  // namespace jointspar
