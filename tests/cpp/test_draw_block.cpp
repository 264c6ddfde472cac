// The draw of blocks of threads: the very bits of the CPU kernel, which sorts.
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "common/draw_block.h"
#include "host_block.h"
#include "jointspar/sample_layers.h"

namespace jointspar {
namespace {

struct Arguments {
    uint64_t seed;
    uint32_t step;
    uint32_t rank;
    uint32_t world_size;
    Strategy strategy;
    Draw draw;
    uint64_t run_length;

    RandomBits random() const {
        return {seed, step, strategy == Strategy::kIndependent ? rank : kAllRanks, run_length};
    }
    bool is_stratified() const { return strategy == Strategy::kStratified; }
};

using Bits = std::vector<uint8_t>;

Bits draw_by_cpu(const std::vector<double>& probabilities, const Arguments& arguments) {
    Bits active(probabilities.size(), 2);
    sample_layers_cpu(probabilities.data(), static_cast<int64_t>(probabilities.size()), arguments.seed, arguments.step,
                      arguments.rank, arguments.world_size, arguments.strategy, arguments.draw, arguments.run_length,
                      active.data());
    return active;
}

// With as many threads and blocks as the launcher takes.
Bits draw_by_blocks(const std::vector<double>& probabilities, const Arguments& arguments) {
    const auto num_layers = static_cast<int64_t>(probabilities.size());
    const bool is_systematic = arguments.draw == Draw::kSystematic;
    const int64_t layers_per_block = is_systematic ? kDrawLayersPerBlock : kDrawThreads;
    const auto tile = std::make_unique<DrawTile>();
    Bits active(probabilities.size(), 2);
    test::run_blocks((num_layers + layers_per_block - 1) / layers_per_block, kDrawThreads, [&](const auto& block) {
        if (is_systematic) {
            draw_systematic_block(block, *tile, probabilities.data(), num_layers, arguments.random(),
                                  arguments.is_stratified(), arguments.rank, arguments.world_size, active.data());
        } else {
            draw_bernoulli_block(block, probabilities.data(), num_layers, arguments.random(), arguments.is_stratified(),
                                 arguments.rank, arguments.world_size, active.data());
        }
    });
    return active;
}

// Any p, with exact 0 and 1, ties at the resolution of fixed point, and halves of it, which round to even.
std::vector<double> random_probabilities(std::mt19937_64& engine, int64_t num_layers) {
    std::uniform_real_distribution<double> uniform;
    const double unit = 0x1.0p-40;
    std::vector<double> probabilities;
    for (int64_t d = 0; d < num_layers; ++d) {
        const double p = uniform(engine);
        const double values[] = {p,
                                 p,
                                 p,
                                 0.0,
                                 1.0,
                                 0.5,
                                 unit * std::rint(1000 * p),
                                 unit * (std::rint(1000 * p) + 0.5),
                                 1.0 - 0.5 * unit,
                                 1.0 - 0.25 * unit,
                                 5e-324};
        probabilities.push_back(values[engine() % 11]);
    }
    return probabilities;
}

TEST(blocks_draw_the_bits_of_the_cpu_kernel) {
    std::mt19937_64 engine(7);
    for (const int64_t num_layers : {1, 31, 33, 161, 257, 1025}) {
        const std::vector<double> probabilities = random_probabilities(engine, num_layers);
        for (const Strategy strategy : {Strategy::kIndependent, Strategy::kStratified, Strategy::kShared}) {
            for (const Draw draw : {Draw::kBernoulli, Draw::kSystematic}) {
                const auto world_size = static_cast<uint32_t>(1 + engine() % (engine() % 2 ? 4 : 1000));
                const auto rank = static_cast<uint32_t>(engine() % world_size);
                Arguments arguments{engine(), static_cast<uint32_t>(engine()), rank, world_size, strategy, draw, 0};
                CHECK(draw_by_blocks(probabilities, arguments) == draw_by_cpu(probabilities, arguments));
                if (draw == Draw::kBernoulli) continue;
                for (const uint64_t run_length : {3u, 5000u}) {
                    arguments.run_length = run_length;
                    CHECK(draw_by_blocks(probabilities, arguments) == draw_by_cpu(probabilities, arguments));
                }
            }
        }
    }
}

TEST(a_layer_key_is_its_run_and_the_upper_half_of_its_random_bits) {
    const auto key_of = [](uint64_t layer, uint64_t run_length) {
        return RandomBits{5, 6, 7, run_length}.layer_key(static_cast<int64_t>(layer));
    };
    const uint64_t last = 0xFFFFFFFF;
    for (const uint64_t layer : {uint64_t{0}, uint64_t{1}, uint64_t{10}, last}) {
        const uint64_t half = key_of(layer, 0) >> 32;
        CHECK(key_of(layer, 1) == (layer << 32 | half));
        CHECK(key_of(layer, 10) == (layer / 10 << 32 | half));
        CHECK(key_of(layer, last) == (uint64_t{layer == last} << 32 | half));
    }
}

TEST(equal_keys_are_ordered_by_index) {
    CHECK(comes_before(1, 9, 2, 0));
    CHECK(!comes_before(2, 0, 1, 9));
    CHECK(comes_before(5, 3, 5, 4));
    CHECK(!comes_before(5, 4, 5, 3));
    CHECK(!comes_before(5, 3, 5, 3));
}

TEST(fixed_probabilities_round_to_even) {
    CHECK(fixed_probability(0.5) == kFixedOne / 2);
    CHECK(fixed_probability(0x1.0p-41) == 0);  // half a unit, between 0 and 1
    CHECK(fixed_probability(0x1.8p-40) == 2);  // between 1 and 2
    CHECK(fixed_probability(0x1.4p-39) == 2);  // between 2 and 3
    CHECK(fixed_probability(1.0 - 0x1.0p-40) == kFixedOne - 1);
    CHECK(fixed_probability(1.0 - 0x1.0p-53) == kFixedOne);
}

TEST(probabilities_outside_of_0_to_1_take_always_or_never) {
    const double infinity = std::numeric_limits<double>::infinity();
    const std::vector<double> always{1.0, 1.5, 1e300, infinity};
    const std::vector<double> never{0.0, -0.0, -0.5, -infinity, std::nan("")};
    for (const Strategy strategy : {Strategy::kIndependent, Strategy::kStratified}) {
        for (const Draw draw : {Draw::kBernoulli, Draw::kSystematic}) {
            for (uint32_t step = 0; step < 2; ++step) {
                const Arguments arguments{3, step, 1, 4, strategy, draw, 0};
                CHECK(draw_by_blocks(always, arguments) == Bits(always.size(), 1));
                CHECK(draw_by_blocks(never, arguments) == Bits(never.size(), 0));
            }
        }
    }
}

TEST(sums_that_wrap_keep_their_fraction) {
    const uint64_t fixed_p = fixed_probability(0.75);
    CHECK(crosses_integer(~uint64_t{0}, 1));
    CHECK(crosses_integer((uint64_t{1} << 63) + kFixedOne / 4, fixed_p));
    CHECK(!crosses_integer((uint64_t{1} << 63) + kFixedOne / 4 - 1, fixed_p));
}

}  // namespace
}  // namespace jointspar
