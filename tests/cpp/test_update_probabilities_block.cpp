// Algorithm 1 by a block of threads, against the CPU kernel and by hand.
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "common/update_probabilities_block.h"
#include "host_block.h"
#include "jointspar/project_probabilities.h"
#include "jointspar/update_probabilities.h"

namespace jointspar {
namespace {

using Values = std::vector<double>;

struct Step {
    Values probabilities;
    Values drawn;
    Values squared_norms;
    std::vector<uint8_t> active;
    double bound;
    BanditParams params;

    int64_t num_layers() const { return static_cast<int64_t>(probabilities.size()); }
};

struct Updated {
    Values probabilities;
    double bound;
};

Updated update_by_cpu(const Step& step) {
    Values updated(step.probabilities.size());
    const double bound =
        update_probabilities_cpu(step.probabilities.data(), step.drawn.data(), step.squared_norms.data(),
                                 step.active.data(), step.num_layers(), step.bound, step.params, updated.data());
    return {updated, bound};
}

Updated update_by_team(const Step& step, int num_threads) {
    Updated result{step.probabilities, step.bound};
    const BanditParams& params = step.params;
    test::run_blocks(1, num_threads, [&](const test::TeamBlock& block) {
        update_probabilities_block(block, result.probabilities.data(), step.drawn.data(), step.squared_norms.data(),
                                   step.active.data(), step.num_layers(), &result.bound, params.budget, params.p_min,
                                   params.bandit_lr, params.shift, result.probabilities.data());
    });
    return result;
}

Values random_distribution(std::mt19937_64& engine, int64_t num_layers, double budget, double p_min) {
    std::normal_distribution<double> normal;
    Values values(static_cast<std::size_t>(num_layers));
    for (double& value : values) value = normal(engine);
    project_probabilities_cpu(values.data(), num_layers, budget, p_min, values.data());
    return values;
}

Step random_step(std::mt19937_64& engine, int64_t num_layers) {
    std::uniform_real_distribution<double> uniform;
    const double p_min = 0.05, budget = static_cast<double>(num_layers) * (0.1 + 0.8 * uniform(engine));
    Step step{random_distribution(engine, num_layers, budget, p_min),
              random_distribution(engine, num_layers, budget, p_min),
              {},
              {},
              engine() % 4 == 0 ? 0.0 : 10.0 * uniform(engine),
              {budget, p_min, std::pow(10.0, 4.0 * uniform(engine) - 3.0), engine() % 2 == 0}};
    const double chance = engine() % 8 == 0 ? 0.0 : uniform(engine);
    for (int64_t d = 0; d < num_layers; ++d) {
        step.active.push_back(uniform(engine) < chance);
        const double norm = std::pow(10.0, 8.0 * uniform(engine) - 4.0);
        step.squared_norms.push_back(step.active.back() ? norm : std::nan(""));  // not read where not active
    }
    return step;
}

TEST(a_block_updates_as_the_cpu_kernel_does) {
    std::mt19937_64 engine(11);
    for (const auto& [num_threads, num_cases] : {std::pair(1, 200), std::pair(4, 20)}) {
        for (int i = 0; i < num_cases; ++i) {
            const Step step = random_step(engine, 2 + static_cast<int64_t>(engine() % 80));
            const Updated expected = update_by_cpu(step);
            const Updated updated = update_by_team(step, num_threads);
            CHECK_CLOSE(updated.bound, expected.bound, 1e-15);
            for (std::size_t d = 0; d < step.probabilities.size(); ++d) {
                CHECK_CLOSE(updated.probabilities[d], expected.probabilities[d], 1e-12);
            }
        }
    }
}

// s/D = q = 1/2 and n2 = L^2: log w_0 grows by bandit_lr * (1/2)^2 / (1/2)^3 = 2 * bandit_lr.
TEST(a_step_by_hand_updates_the_bound_in_place) {
    const Step step{{0.5, 0.5}, {0.5, 0.5}, {4.0, 0.0}, {1, 0}, 0.0, {1.0, 0.1, 0.05, false}};
    const Updated updated = update_by_team(step, 2);
    CHECK(updated.bound == 2.0);
    CHECK_CLOSE(updated.probabilities[0], 1.0 / (1.0 + std::exp(-0.1)), 1e-14);
    CHECK_CLOSE(updated.probabilities[1], 1.0 / (1.0 + std::exp(0.1)), 1e-14);
}

TEST(a_wrong_squared_norm_leaves_probabilities_and_bound) {
    const double infinity = std::numeric_limits<double>::infinity();
    for (const double wrong : {infinity, std::nan(""), -1.0}) {
        const Step step{{0.3, 0.7}, {0.3, 0.7}, {4.0, wrong}, {1, 1}, 2.0, {1.0, 0.1, 0.05, false}};
        const Updated updated = update_by_team(step, 2);
        CHECK(updated.bound == 2.0);
        CHECK(updated.probabilities == step.probabilities);
    }
}

TEST(nothing_active_leaves_probabilities_and_decays_the_bound) {
    const Step step{{0.3, 0.7}, {0.3, 0.7}, {4.0, 1.0}, {0, 0}, 2.0, {1.0, 0.1, 0.05, false}};
    const Updated updated = update_by_team(step, 2);
    CHECK_CLOSE(updated.bound, 2.0 * std::sqrt(0.99), 1e-15);
    CHECK(updated.probabilities == step.probabilities);
}

TEST(zero_gradients_without_a_bound_leave_probabilities) {
    const Step step{{0.3, 0.7}, {0.3, 0.7}, {0.0, 0.0}, {1, 1}, 0.0, {1.0, 0.1, 0.05, true}};
    const Updated updated = update_by_team(step, 2);
    CHECK(updated.bound == 0.0);
    CHECK(updated.probabilities == step.probabilities);
}

TEST(no_layers_decay_the_bound) {
    const Step step{{}, {}, {}, {}, 2.0, {0.0, 0.1, 0.05, false}};
    CHECK_CLOSE(update_by_team(step, 2).bound, 2.0 * std::sqrt(0.99), 1e-15);
}

}  // namespace
}  // namespace jointspar
