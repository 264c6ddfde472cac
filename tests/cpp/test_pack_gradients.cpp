#include "check.h"
#include "common/float16.h"
#include "jointspar/pack_gradients.h"

namespace jointspar {
namespace {

TEST(pack_writes_scaled_slices_zeros_for_null_and_nothing_else) {
    const std::vector<float> first{1.0f, -2.0f, 3.0f};
    const std::vector<double> second{0.5, 4.0};
    std::vector<float> packed(10, 99.0f);
    const std::vector<PackSlice> slices{{first.data(), DType::kFloat32, 1, 3, 2.0},
                                        {nullptr, DType::kFloat32, 4, 2, 3.0},
                                        {second.data(), DType::kFloat64, 7, 2, -1.0}};
    std::vector<double> norms(3);
    pack_gradients_cpu(slices.data(), 3, packed.data(), DType::kFloat32, norms.data());
    CHECK((packed == std::vector<float>{99, 2, -4, 6, 0, 0, 99, -0.5f, -4, 99}));
    CHECK((norms == std::vector<double>{14.0, 0.0, 16.25}));
}

// Large enough to be written around the cache, at every alignment that an element size allows.
template <class Packed>
void check_large_pack(DType dtype, int64_t shift) {
    constexpr int64_t kSize = 12'000'007;
    const std::vector<float> source = test::random_floats(kSize, 3);
    std::vector<Packed> packed(static_cast<std::size_t>(kSize + shift + 1));
    const PackSlice slice{source.data(), DType::kFloat32, shift, kSize, 1.5};
    double norm = 0.0;
    pack_gradients_cpu(&slice, 1, packed.data(), dtype, &norm);
    double exact = 0.0;
    for (const float value : source) exact += static_cast<double>(value) * value;
    CHECK(norm > exact * (1 - 1e-6) && norm < exact * (1 + 1e-6));
    int64_t num_wrong = 0;
    for (std::size_t i = 0; i < source.size(); ++i) {
        const auto expected = convert<Packed>(source[i] * 1.5f);
        const auto& found = packed[i + static_cast<std::size_t>(shift)];
        if (memcmp(&expected, &found, sizeof(Packed)) != 0) ++num_wrong;
    }
    CHECK(num_wrong == 0);
    CHECK(convert<float>(packed.back()) == 0.0f);
}

TEST(large_packs_are_right_at_every_alignment) {
    for (int64_t shift = 0; shift < 4; ++shift) check_large_pack<float>(DType::kFloat32, shift);
    for (int64_t shift = 0; shift < 8; ++shift) check_large_pack<BFloat16>(DType::kBFloat16, shift);
}

}  // namespace
}  // namespace jointspar
