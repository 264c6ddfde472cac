#include "check.h"

int main() {
    for (const auto& test : jointspar::test::registry()) {
        const int failures_before = jointspar::test::num_failures();
        test.run();
        std::printf("%s %s\n", jointspar::test::num_failures() == failures_before ? "ok    " : "FAILED", test.name);
    }
    return jointspar::test::num_failures() == 0 ? 0 : 1;
}
