#include "check.h"
#include "common/float16.h"
#include "jointspar/unpack_gradients.h"

namespace jointspar {
namespace {

TEST(unpack_copies_or_adds_each_slice) {
    const std::vector<float> packed{1.0f, 2.0f, 3.0f, 4.0f, 5.0f};
    std::vector<float> first{10.0f, 10.0f};
    std::vector<double> second{20.0, 20.0};
    const std::vector<UnpackSlice> slices{{first.data(), DType::kFloat32, 0, 2},
                                          {second.data(), DType::kFloat64, 3, 2}};
    unpack_gradients_cpu(packed.data(), DType::kFloat32, slices.data(), 2, true);
    CHECK((first == std::vector<float>{11, 12}));
    CHECK((second == std::vector<double>{24, 25}));
    unpack_gradients_cpu(packed.data(), DType::kFloat32, slices.data(), 2, false);
    CHECK((first == std::vector<float>{1, 2}));
    CHECK((second == std::vector<double>{4, 5}));
}

TEST(large_unpacks_copy_every_element) {
    const std::vector<float> packed = test::random_floats(12'000'011, 4);
    std::vector<float> target(packed.size() + 1);
    const UnpackSlice slice{target.data() + 1, DType::kFloat32, 0, static_cast<std::int64_t>(packed.size())};
    unpack_gradients_cpu(packed.data(), DType::kFloat32, &slice, 1, false);
    CHECK(target.front() == 0.0f);
    CHECK(std::vector<float>(target.begin() + 1, target.end()) == packed);
}

TEST(large_unpacks_convert_every_element) {
    std::vector<BFloat16> packed;
    for (const float value : test::random_floats(12'000'011, 6)) packed.push_back(convert<BFloat16>(value));
    std::vector<float> target(packed.size() + 1);
    const UnpackSlice slice{target.data() + 1, DType::kFloat32, 0, static_cast<std::int64_t>(packed.size())};
    unpack_gradients_cpu(packed.data(), DType::kBFloat16, &slice, 1, false);
    std::int64_t num_wrong = 0;
    for (std::size_t i = 0; i < packed.size(); ++i) num_wrong += target[i + 1] != convert<float>(packed[i]) ? 1 : 0;
    CHECK(num_wrong == 0);
}

TEST(add_packed_adds_in_place) {
    std::vector<float> sum{1.0f, 2.0f, 3.0f};
    const std::vector<float> packed{0.5f, -2.0f, 1e30f};
    add_packed_cpu(sum.data(), packed.data(), DType::kFloat32, 3);
    CHECK((sum == std::vector<float>{1.5f, 0.0f, 1e30f}));
}

}  // namespace
}  // namespace jointspar
