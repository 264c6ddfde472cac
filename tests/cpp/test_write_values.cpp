#include "check.h"
#include "common/float16.h"
#include "cpu/non_temporal.h"

namespace jointspar {
namespace {

constexpr int kLanes = SquareLanes<float>::kLanes;
constexpr std::size_t kMostElements = 4096;
constexpr std::size_t kGuard = 64;  // elements behind the target that must stay
const std::vector<std::size_t> kSizes{0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 1000, 4095, 4096};

template <class Source, class Packed>
double pack(const Source* source, Packed* target, int64_t size, bool streaming) {
    SquareLanes<accumulator_t<Source>> squares;
    const int64_t shift = write_values<kLanes>(target, size, streaming, [&](int64_t i, int lane) {
        const auto value = convert<accumulator_t<Source>>(source[i]);
        squares.lanes[lane] += value * value;
        return convert<Packed>(value + value);
    });
    return checked_total(squares, source, size, shift);
}

// Around the cache or not: the same values, the same bits of the sum, and nothing beyond the end.
template <class Source, class Packed>
void check_streaming() {
    const std::vector<float> numbers = test::random_floats(static_cast<int64_t>(kMostElements), 5);
    std::vector<Source> source;
    for (const float number : numbers) source.push_back(convert<Source>(number));
    int64_t num_wrong = 0;
    for (const std::size_t size : kSizes) {
        for (std::size_t offset = 0; offset < kLineBytes / sizeof(Packed); ++offset) {
            alignas(kLineBytes) static Packed plain[kMostElements + 2 * kGuard];
            alignas(kLineBytes) static Packed streamed[kMostElements + 2 * kGuard];
            memset(static_cast<void*>(plain), 0x5A, sizeof plain);
            memset(static_cast<void*>(streamed), 0x5A, sizeof streamed);
            const auto count = static_cast<int64_t>(size);
            const double sum = pack(source.data(), plain + offset, count, false);
            const double streamed_sum = pack(source.data(), streamed + offset, count, true);
            finish_non_temporal();
            if (memcmp(&sum, &streamed_sum, sizeof sum) != 0) ++num_wrong;
            if (memcmp(plain, streamed, sizeof plain) != 0) ++num_wrong;
            for (std::size_t i = 0; i < size; ++i) {
                const auto value = convert<accumulator_t<Source>>(source[i]);
                const auto expected = convert<Packed>(value + value);
                if (memcmp(&expected, &streamed[offset + i], sizeof expected) != 0) ++num_wrong;
            }
        }
    }
    CHECK(num_wrong == 0);
}

TEST(streamed_values_and_sums_have_the_bits_of_plain_ones_at_every_alignment) {
    check_streaming<float, float>();
    check_streaming<double, double>();
    check_streaming<float, BFloat16>();
    check_streaming<BFloat16, float>();
    check_streaming<double, Float16>();
    check_streaming<Float16, BFloat16>();
}

}  // namespace
}  // namespace jointspar
