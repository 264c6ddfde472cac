#include <cfloat>
#include <cmath>
#include <limits>

#include "check.h"
#include "common/float16.h"
#include "cpu/half_floats.h"

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

TEST(the_processors_conversions_of_float16_give_the_bits_of_the_portable_ones) {
    constexpr int64_t kSize = 4099;  // no multiple of a vector's length
    if (!has_half_conversions()) return;
    static Float16 halves[kSize];
    static float floats[kSize];
    for (uint32_t first = 0; first < 0x10000u; first += kSize) {
        for (uint32_t i = 0; i < kSize; ++i) halves[i].bits = static_cast<uint16_t>(first + i);
        to_floats(halves, floats, kSize);
        for (int64_t i = 0; i < kSize; ++i) {
            const uint32_t quiet = std::isnan(floats[i]) ? 0x00400000u : 0u;  // the instruction makes NaN quiet at once
            CHECK(bit_cast<uint32_t>(floats[i]) == (bit_cast<uint32_t>(to_float(halves[i])) | quiet));
        }
    }
    constexpr uint64_t kStep = 977;  // some of each exponent
    for (uint64_t first = 0; first < 0x100000000u; first += kStep * kSize) {
        for (uint64_t i = 0; i < kSize; ++i) floats[i] = bit_cast<float>(static_cast<uint32_t>(first + kStep * i));
        to_halves(floats, halves, kSize);
        for (int64_t i = 0; i < kSize; ++i) CHECK(halves[i].bits == to_float16(floats[i]).bits);
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
