// The projection of a block of threads against the CPU kernel, a solver in long double, and its own promises.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "check.h"
#include "common/projection_block.h"
#include "host_block.h"
#include "jointspar/project_probabilities.h"

namespace jointspar {
namespace {

struct Problem {
    std::vector<double> log_weights;
    double budget;
    double p_min;

    int64_t num_layers() const { return static_cast<int64_t>(log_weights.size()); }
};

using Values = std::vector<double>;

Values project_by_cpu(const Problem& problem) {
    Values q(problem.log_weights.size());
    project_probabilities_cpu(problem.log_weights.data(), problem.num_layers(), problem.budget, problem.p_min,
                              q.data());
    return q;
}

Values project_by_one_thread(const Problem& problem, int* num_reductions = nullptr) {
    Values q(problem.log_weights.size());
    const test::SerialBlock block;
    ProjectionBlock<test::SerialBlock>(block, problem.log_weights.data(), problem.num_layers(), problem.budget,
                                       problem.p_min)
        .write(q.data());
    if (num_reductions) *num_reductions = block.num_reductions();
    return q;
}

// In place, as an update of probabilities does it.
Values project_by_team(const Problem& problem, int num_threads) {
    Values q = problem.log_weights;
    test::run_blocks(1, num_threads, [&](const test::TeamBlock& block) {
        ProjectionBlock<test::TeamBlock>(block, q.data(), problem.num_layers(), problem.budget, problem.p_min)
            .write(q.data());
    });
    return q;
}

long double clipped_sum(const Problem& problem, long double log_c) {
    const long double log_p_min = std::log(static_cast<long double>(problem.p_min));
    long double sum = 0;
    for (const double log_weight : problem.log_weights) {
        const long double log_q = log_c + static_cast<long double>(log_weight);
        sum += log_q >= 0 ? 1 : log_q <= log_p_min ? static_cast<long double>(problem.p_min) : std::exp(log_q);
    }
    return sum;
}

// Sorts all breakpoints of log c, finds the two around the budget by bisection, and solves between them.
Values project_in_long_double(const Problem& problem) {
    const auto p_min = static_cast<long double>(problem.p_min);
    const auto budget = static_cast<long double>(problem.budget);
    std::vector<long double> breakpoints;
    for (const double log_weight : problem.log_weights) {
        breakpoints.push_back(-static_cast<long double>(log_weight));
        breakpoints.push_back(std::log(p_min) - static_cast<long double>(log_weight));
    }
    std::sort(breakpoints.begin(), breakpoints.end());
    const auto above = std::partition_point(breakpoints.begin(), breakpoints.end(),
                                            [&](long double log_c) { return clipped_sum(problem, log_c) <= budget; });
    const long double low = above == breakpoints.begin() ? *above : *(above - 1);
    const long double high = above == breakpoints.end() ? low : *above;
    const long double inside = 0.5L * (low + high);
    const auto log_q = [&](double log_weight) { return inside + static_cast<long double>(log_weight); };
    const auto is_one = [&](double log_weight) { return log_q(log_weight) >= 0; };
    const auto is_min = [&](double log_weight) { return log_q(log_weight) <= std::log(p_min); };
    long double rest = budget, free = 0;
    for (const double log_weight : problem.log_weights) {
        rest -= is_one(log_weight) ? 1 : is_min(log_weight) ? p_min : 0;
        free += is_one(log_weight) || is_min(log_weight) ? 0 : std::exp(log_q(log_weight));
    }
    Values q;
    for (const double log_weight : problem.log_weights) {
        const long double scaled = std::clamp(rest / free * std::exp(log_q(log_weight)), p_min, 1.0L);
        q.push_back(static_cast<double>(is_one(log_weight) ? 1 : is_min(log_weight) ? p_min : scaled));
    }
    return q;
}

enum class Shape { kSmooth, kTies, kThreeLevels, kHeavyTail, kNumShapes };

Problem random_problem(std::mt19937_64& engine, int64_t num_layers, double spread) {
    std::uniform_real_distribution<double> uniform;
    std::normal_distribution<double> normal;
    const auto shape = static_cast<Shape>(engine() % static_cast<unsigned>(Shape::kNumShapes));
    Problem problem;
    for (int64_t d = 0; d < num_layers; ++d) {
        const double values[] = {
            spread * (2.0 * uniform(engine) - 1.0), std::rint(10.0 * spread * normal(engine)) / 10.0,
            spread * (static_cast<double>(engine() % 3) - 1.0), spread * std::log(uniform(engine) + 1e-300)};
        problem.log_weights.push_back(values[static_cast<int>(shape)]);
    }
    const auto count = static_cast<double>(num_layers);
    const double exponent = engine() % 8 == 0 ? -100.0 : -6.0;
    problem.p_min = std::pow(10.0, exponent * uniform(engine));
    const double fractions[] = {uniform(engine), uniform(engine), uniform(engine), 1e-12, 1.0 - 1e-12, 0.0, 1.0};
    const double smallest = problem.p_min * count;
    problem.budget = smallest + fractions[engine() % 7] * (count - smallest);
    if (engine() % 3 == 0) problem.budget = std::clamp(std::rint(problem.budget), std::ceil(smallest), count);
    return problem;
}

void check_feasible(const Problem& problem, const Values& q) {
    long double sum = 0;
    bool in_bounds = true;
    for (const double value : q) {
        in_bounds = in_bounds && value >= problem.p_min && value <= 1.0;
        sum += static_cast<long double>(value);
    }
    CHECK(in_bounds);
    CHECK(std::fabs(static_cast<double>(sum) - problem.budget) <= 1e-12 * std::max(1.0, problem.budget));
}

// To the rounding of the budget, which is all that determines q where few of the layers are free.
double largest_difference(const Values& q, const Values& expected) {
    double largest = 0.0;
    for (std::size_t d = 0; d < q.size(); ++d) {
        const double difference = std::fabs(q[d] - expected[d]);
        largest = std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(largest, difference);
    }
    return largest;
}

double tolerance_of(const Problem& problem) { return 1e-14 + 4e-15 * std::max(1.0, problem.budget); }

constexpr double kSpreads[] = {0.0, 1.0, 10.0, 100.0, 1e4};

template <class Check>
void for_each_problem(const std::vector<std::pair<int64_t, int>>& sizes_and_cases, Check check) {
    std::mt19937_64 engine(20220717);
    for (const double spread : kSpreads) {
        for (const auto& [num_layers, num_cases] : sizes_and_cases) {
            for (int i = 0; i < num_cases; ++i) check(random_problem(engine, num_layers, spread));
        }
    }
}

TEST(a_block_projects_as_long_double_does) {
    for_each_problem({{1, 200}, {2, 400}, {3, 400}, {10, 400}, {161, 60}, {1000, 4}}, [](const Problem& problem) {
        const Values q = project_by_one_thread(problem);
        check_feasible(problem, q);
        CHECK(largest_difference(q, project_in_long_double(problem)) <= tolerance_of(problem));
    });
}

TEST(a_block_projects_as_the_cpu_kernel_does) {
    for_each_problem({{1, 200}, {2, 400}, {10, 400}, {161, 200}, {1000, 20}, {100000, 2}}, [](const Problem& problem) {
        const Values q = project_by_one_thread(problem);
        check_feasible(problem, q);
        CHECK(largest_difference(q, project_by_cpu(problem)) <= tolerance_of(problem));
    });
}

TEST(threads_of_a_block_agree_in_place) {
    for (const int num_threads : {2, 4, 16}) {
        for_each_problem({{1, 3}, {3, 3}, {161, 3}}, [&](const Problem& problem) {
            const Values q = project_by_team(problem, num_threads);
            check_feasible(problem, q);
            CHECK(largest_difference(q, project_by_cpu(problem)) <= tolerance_of(problem));
            CHECK(q == project_by_team(problem, num_threads));
        });
    }
}

TEST(the_work_is_bounded_whatever_the_weights) {
    int most = 0;
    const auto check = [&](const Problem& problem) {
        int num_reductions = 0;
        project_by_one_thread(problem, &num_reductions);
        most = std::max(most, num_reductions);
    };
    for_each_problem({{1, 50}, {2, 200}, {10, 200}, {161, 200}, {1000, 50}, {20000, 2}}, check);
    CHECK(most <= 120);
}

// The level of c that decides is far below the largest weight, and the two lower groups differ by one unit in the last
// place: 1.8e-12 of their q.
TEST(neighbouring_log_weights_far_below_the_largest_are_told_apart) {
    const double low = -1e4 / 3, high = std::nextafter(low, 0.0);
    for (double largest : {1.0, 1e4 / 7}) {
        for (int i = 0; i < 60; ++i) {
            const double deficit = 1e-13 * i;
            for (const double target : {1.0 - deficit, 0.25 * (1.0 + deficit)}) {
                Problem problem{{largest}, 1.0 + 1000 * target, 0.25};
                for (int d = 0; d < 1000; ++d) problem.log_weights.push_back(d % 2 ? low : high);
                const Values q = project_by_one_thread(problem);
                check_feasible(problem, q);
                CHECK(largest_difference(q, project_in_long_double(problem)) <= 1e-14);
            }
        }
    }
}

TEST(larger_weights_never_get_less) {
    for_each_problem({{10, 100}, {161, 20}}, [](Problem problem) {
        std::sort(problem.log_weights.begin(), problem.log_weights.end());
        const Values q = project_by_one_thread(problem);
        CHECK(std::is_sorted(q.begin(), q.end()));
    });
}

TEST(hand_computed_projections) {
    struct Case {
        Values weights;
        double budget;
        double p_min;
        Values expected;
    };
    const Case cases[] = {
        {{1, 1, 1, 1}, 2.0, 0.1, {0.5, 0.5, 0.5, 0.5}},
        {{4, 1}, 1.0, 0.1, {0.8, 0.2}},
        {{100, 1}, 1.0, 0.1, {0.9, 0.1}},
        {{100, 1, 1}, 2.0, 0.1, {1.0, 0.5, 0.5}},
        {{1e6, 3, 1, 1e-6}, 1.9, 0.1, {1.0, 0.6, 0.2, 0.1}},
        {{1e6, 1e-6}, 1.1, 0.1, {1.0, 0.1}},
        {{2, 2, 1}, 1.25, 0.25, {0.5, 0.5, 0.25}},
        {{5}, 0.3, 0.1, {0.3}},
    };
    for (const Case& example : cases) {
        Problem problem{{}, example.budget, example.p_min};
        for (const double weight : example.weights) problem.log_weights.push_back(std::log(weight));
        const Values q = project_by_one_thread(problem);
        for (std::size_t d = 0; d < q.size(); ++d) CHECK_CLOSE(q[d], example.expected[d], 1e-14);
    }
}

TEST(the_ends_of_the_feasible_range_are_exact) {
    for (const double budget : {3.0, 3.0 + 2e-9})
        CHECK(project_by_one_thread({{3, -2, 0}, budget, 0.1}) == Values(3, 1.0));
    for (const double budget : {3 * 0.1, 0.3, 0.3 - 9e-10}) {
        CHECK(project_by_one_thread({{3, -2, 0}, budget, 0.1}) == Values(3, 0.1));
    }
    CHECK(project_by_one_thread({{3, -2, 0}, 3.0, 1.0}) == Values(3, 1.0));
    CHECK(project_by_one_thread({{}, 0.0, 0.5}).empty());
}

TEST(a_log_weight_that_is_not_finite_makes_all_nan) {
    const double infinity = std::numeric_limits<double>::infinity();
    for (const double wrong : {infinity, -infinity, std::nan("")}) {
        for (const double budget : {1.0, 3.0, 0.3}) {
            for (const double q : project_by_one_thread({{0.0, wrong, 1.0}, budget, 0.1})) CHECK(std::isnan(q));
        }
    }
}

TEST(the_largest_finite_log_weights_are_valid) {
    const double largest = std::numeric_limits<double>::max();
    const Values q = project_by_one_thread({{largest, -largest, 0.0}, 1.5, 0.1});
    const double expected[] = {1.0, 0.1, 0.4};
    for (std::size_t d = 0; d < 3; ++d) CHECK_CLOSE(q[d], expected[d], 1e-14);
}

}  // namespace
}  // namespace jointspar
