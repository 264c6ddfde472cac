#include <omp.h>

#include <limits>

#include "check.h"
#include "common/layer_table.h"
#include "jointspar/squared_norms.h"

namespace jointspar {
namespace {

double squared_norm(const std::vector<float>& values) {
    const NormSlice slice{values.data(), DType::kFloat32, static_cast<int64_t>(values.size())};
    double norm = -1.0;
    squared_norms_cpu(&slice, 1, &norm);
    return norm;
}

double reference(const std::vector<float>& values) {
    double sum = 0.0;
    for (const float value : values) sum += static_cast<double>(value) * static_cast<double>(value);
    return sum;
}

TEST(squared_norm_agrees_with_double_at_odd_sizes) {
    for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{31}, int64_t{33}, kChunkSize + 1, 7 * kChunkSize - 5}) {
        const std::vector<float> values = test::random_floats(size, 1);
        CHECK_CLOSE(squared_norm(values), reference(values), 1e-6);
    }
}

TEST(squared_norm_has_the_same_bits_for_any_number_of_threads) {
    const std::vector<float> values = test::random_floats(20 * kChunkSize + 11, 2);
    const int threads_before = omp_get_max_threads();
    omp_set_num_threads(1);
    const double serial = squared_norm(values);
    for (const int num_threads : {2, 3, 8}) {
        omp_set_num_threads(num_threads);
        CHECK(squared_norm(values) == serial);
    }
    omp_set_num_threads(threads_before);
}

TEST(squares_beyond_the_float_range_are_summed_in_double) {
    for (const float value : {1e30f, 1e20f, 1e-20f, 1e-30f, 1e-44f}) {
        const std::vector<float> values(40000, value);
        CHECK_CLOSE(squared_norm(values), reference(values), 1e-7);
    }
}

TEST(a_nan_or_infinity_anywhere_reaches_the_norm) {
    std::vector<float> values(3 * static_cast<std::size_t>(kChunkSize), 1.0f);
    for (const std::size_t at : {std::size_t{0}, values.size() / 2, values.size() - 1}) {
        values[at] = std::numeric_limits<float>::infinity();
        CHECK(std::isinf(squared_norm(values)));
        values[at] = std::numeric_limits<float>::quiet_NaN();
        CHECK(std::isnan(squared_norm(values)));
        values[at] = 1.0f;
    }
}

}  // namespace
}  // namespace jointspar
