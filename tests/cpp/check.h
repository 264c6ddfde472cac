// Assertions and a registry of tests: TEST(name) { CHECK(...); }. A failure prints its place and the run goes on.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace jointspar::test {

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& registry() {
    static std::vector<Test> tests;
    return tests;
}

inline int& num_failures() {
    static int count = 0;
    return count;
}

struct Registration {
    Registration(const char* name, void (*run)()) { registry().push_back({name, run}); }
};

inline bool is_close(double a, double b, double relative) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
    return a == b || std::fabs(a - b) <= relative * std::fmax(std::fabs(a), std::fabs(b));
}

inline std::vector<float> random_floats(std::int64_t size, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(size));
    for (float& value : values) value = normal(engine);
    return values;
}

}  // namespace jointspar::test

#define TEST(name)                                                                   \
    static void name();                                                              \
    static const jointspar::test::Registration registration_of_##name(#name, &name); \
    static void name()

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            std::printf("  %s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
            ++jointspar::test::num_failures();                                          \
        }                                                                               \
    } while (false)

#define CHECK_CLOSE(a, b, relative)                                                                           \
    do {                                                                                                      \
        const double value_a = (a);                                                                           \
        const double value_b = (b);                                                                           \
        if (!jointspar::test::is_close(value_a, value_b, relative)) {                                         \
            std::printf("  %s:%d: %s is %.17g, %s is %.17g\n", __FILE__, __LINE__, #a, value_a, #b, value_b); \
            ++jointspar::test::num_failures();                                                                \
        }                                                                                                     \
    } while (false)
