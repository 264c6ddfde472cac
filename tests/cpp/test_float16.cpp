#include <cfloat>
#include <limits>

#include "check.h"
#include "common/float16.h"

namespace jointspar {
namespace {

TEST(float16_survives_the_way_through_float) {
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const Float16 value{static_cast<uint16_t>(bits)};
        const bool is_nan = (bits & 0x7FFFu) > 0x7C00u;
        const uint32_t expected = is_nan ? bits | 0x0200u : bits;  // NaN becomes quiet
        CHECK(to_float16(to_float(value)).bits == expected);
    }
}

TEST(bfloat16_survives_the_way_through_float) {
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const BFloat16 value{static_cast<uint16_t>(bits)};
        const bool is_nan = (bits & 0x7FFFu) > 0x7F80u;
        CHECK(to_bfloat16(to_float(value)).bits == (is_nan ? 0xFFFFu : bits));
    }
}

TEST(bfloat16_of_any_nan_is_all_ones) {
    for (const uint32_t word : {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800001u, 0xFFFFFFFFu}) {
        CHECK(to_bfloat16(bit_cast<float>(word)).bits == 0xFFFF);
    }
}

TEST(float16_values_by_hand) {
    CHECK(to_float(Float16{0x3C00}) == 1.0f);
    CHECK(to_float(Float16{0xC000}) == -2.0f);
    CHECK(to_float(Float16{0x0001}) == 0x1.0p-24f);
    CHECK(to_float(Float16{0x7BFF}) == 65504.0f);
    CHECK(to_float(Float16{0x7C00}) == std::numeric_limits<float>::infinity());
    CHECK(to_float16(65519.0f).bits == 0x7BFF);  // below the middle between 65504 and 65536
    CHECK(to_float16(65520.0f).bits == 0x7C00);  // the middle goes to even: infinity
    CHECK(to_float16(0x1.0p-25f).bits == 0x0000);
    CHECK(to_float16(0x1.8p-25f).bits == 0x0001);
    CHECK(to_float16(-0.0f).bits == 0x8000);
}

TEST(rounding_ties_go_to_even) {
    CHECK(to_float16(1.0f + 0x1.0p-11f).bits == 0x3C00);
    CHECK(to_float16(1.0f + 0x1.8p-10f).bits == 0x3C02);
    CHECK(to_bfloat16(1.0f + 0x1.0p-8f).bits == 0x3F80);
    CHECK(to_bfloat16(1.0f + 0x1.8p-7f).bits == 0x3F82);
    CHECK(to_bfloat16(FLT_MAX).bits == 0x7F80);
}

}  // namespace
}  // namespace jointspar
