#include "device_case.h"
#include "jointspar/pack_gradients.h"
#include "jointspar/squared_norms.h"
#include "jointspar/unpack_gradients.h"

namespace jointspar {
namespace {

using test::Array;

using test::Device;
using test::kDTypes;
using test::kSliceSizes;

std::vector<Array> random_arrays(DType dtype, int64_t skew) {
    std::vector<Array> arrays;
    for (const int64_t size : kSliceSizes) {
        arrays.push_back(Array::random(dtype, size, static_cast<unsigned>(arrays.size()), skew));
    }
    return arrays;
}

// Packed in reverse, with a gap of `gap` elements between the slices. Slice 5 has no source.
std::vector<PackSlice> pack_slices(const std::vector<Array>& sources, int64_t gap, int64_t* total) {
    std::vector<PackSlice> slices(sources.size());
    int64_t offset = gap;
    for (std::size_t k = sources.size(); k-- > 0;) {
        slices[k] = {k == 5 ? nullptr : sources[k].data(), sources[k].dtype(), offset, sources[k].size(),
                     1.0 / (1.0 + static_cast<double>(k))};
        offset += sources[k].size() + gap;
    }
    *total = offset;
    return slices;
}

void check_pack(DType source_dtype, DType packed_dtype, int64_t skew, int64_t gap) {
    const std::vector<Array> sources = random_arrays(source_dtype, skew);
    int64_t total = 0;
    const std::vector<PackSlice> slices = pack_slices(sources, gap, &total);
    const auto num_slices = static_cast<int64_t>(slices.size());
    Array expected = Array::random(packed_dtype, total, 99);
    Array packed = expected;
    std::vector<double> norms(slices.size(), -1.0);
    pack_gradients_cpu(slices.data(), num_slices, expected.data(), packed_dtype, nullptr);
    const Device device;
    pack_gradients_cuda(slices.data(), num_slices, packed.data(), packed_dtype, norms.data(), device.queue);
    device.synchronize();
    CHECK(packed == expected);
    for (std::size_t k = 0; k < slices.size(); ++k) {
        CHECK_CLOSE(norms[k], k == 5 ? 0.0 : sources[k].squared_norm(), 1e-6);
    }
}

TEST(pack_cuda_has_the_bits_of_pack_cpu) {
    for (const DType source_dtype : kDTypes) {
        for (const DType packed_dtype : kDTypes) {
            check_pack(source_dtype, packed_dtype, 0, 0);
            check_pack(source_dtype, packed_dtype, 0, 16);
            check_pack(source_dtype, packed_dtype, 1, 3);
        }
    }
}

TEST(pack_cuda_takes_sources_of_several_dtypes) {
    const Device device;
    std::vector<Array> sources;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
        sources.push_back(Array::random(dtype, 5000, static_cast<unsigned>(sources.size())));
    }
    std::vector<PackSlice> slices;
    for (const Array& source : sources) {
        slices.push_back({source.data(), source.dtype(), static_cast<int64_t>(slices.size()) * 5000, 5000, 2.0});
    }
    Array packed(DType::kFloat32, 20000);
    std::vector<double> norms(4, -1.0);
    pack_gradients_cuda(slices.data(), 4, packed.data(), DType::kFloat32, norms.data(), device.queue);
    device.synchronize();
    for (std::size_t k = 0; k < 4; ++k) {
        CHECK_CLOSE(norms[k], sources[k].squared_norm(), 1e-6);
        const auto at = static_cast<int64_t>(k) * 5000 + 4999;
        CHECK_CLOSE(packed[at], 2.0 * sources[k][4999], 1e-7);
    }
}

TEST(pack_cuda_without_norms_and_without_slices) {
    const Device device;
    const Array source = Array::random(DType::kFloat32, 9000, 1);
    const PackSlice slice{source.data(), DType::kFloat32, 0, 9000, 1.0};
    Array packed(DType::kFloat32, 9000);
    pack_gradients_cuda(&slice, 1, packed.data(), DType::kFloat32, nullptr, device.queue);
    pack_gradients_cuda(&slice, 0, nullptr, DType::kFloat32, nullptr, device.queue);
    device.synchronize();
    CHECK(packed == source);
}

void check_unpack(DType packed_dtype, DType target_dtype, int64_t skew, bool add) {
    std::vector<Array> targets = random_arrays(target_dtype, skew);
    std::vector<Array> expected = targets;
    std::vector<UnpackSlice> slices;
    std::vector<UnpackSlice> expected_slices;
    int64_t offset = skew;
    for (std::size_t k = 0; k < targets.size(); ++k) {
        slices.push_back({targets[k].data(), target_dtype, offset, targets[k].size()});
        expected_slices.push_back({expected[k].data(), target_dtype, offset, targets[k].size()});
        offset += targets[k].size();
    }
    const Array packed = Array::random(packed_dtype, offset, 7);
    const auto num_slices = static_cast<int64_t>(slices.size());
    unpack_gradients_cpu(packed.data(), packed_dtype, expected_slices.data(), num_slices, add);
    const Device device;
    unpack_gradients_cuda(packed.data(), packed_dtype, slices.data(), num_slices, add, device.queue);
    device.synchronize();
    CHECK(targets == expected);
}

TEST(unpack_cuda_has_the_bits_of_unpack_cpu) {
    for (const DType packed_dtype : kDTypes) {
        for (const DType target_dtype : kDTypes) {
            for (const bool add : {false, true}) {
                check_unpack(packed_dtype, target_dtype, 0, add);
                check_unpack(packed_dtype, target_dtype, 1, add);
            }
        }
    }
}

TEST(add_packed_cuda_has_the_bits_of_add_packed_cpu) {
    for (const DType dtype : kDTypes) {
        for (const int64_t size : {0, 1, 4096, 4097, 20003}) {
            for (const int64_t skew : {0, 1}) {
                const Array packed = Array::random(dtype, size, 3, skew);
                Array sum = Array::random(dtype, size, 4, skew);
                Array expected = sum;
                add_packed_cpu(expected.data(), packed.data(), dtype, size);
                const Device device;
                add_packed_cuda(sum.data(), packed.data(), dtype, size, device.queue);
                device.synchronize();
                CHECK(sum == expected);
            }
        }
    }
}

std::vector<double> norms_of(const std::vector<Array>& arrays) {
    std::vector<NormSlice> slices;
    for (const Array& array : arrays) slices.push_back({array.data(), array.dtype(), array.size()});
    std::vector<double> norms(arrays.size(), -1.0);
    const Device device;
    squared_norms_cuda(slices.data(), static_cast<int64_t>(slices.size()), norms.data(), device.queue);
    device.synchronize();
    return norms;
}

TEST(squared_norms_cuda_agree_with_double_for_all_dtypes_at_once) {
    std::vector<Array> arrays;
    for (const DType dtype : kDTypes) {
        for (const int64_t skew : {0, 1}) {
            for (const Array& array : random_arrays(dtype, skew)) arrays.push_back(array);
        }
    }
    const std::vector<double> norms = norms_of(arrays);
    for (std::size_t k = 0; k < arrays.size(); ++k) CHECK_CLOSE(norms[k], arrays[k].squared_norm(), 1e-6);
    CHECK(norms_of(arrays) == norms);
}

TEST(squares_beyond_the_float_range_are_summed_in_double_on_the_device) {
    for (const double value : {1e30, 1e20, 1e-20, 1e-30, 1e-44}) {
        Array array(DType::kFloat32, 10000);
        for (int64_t i = 0; i < 10000; ++i) array.set(i, value);
        CHECK_CLOSE(norms_of({array})[0], array.squared_norm(), 1e-7);
    }
}

TEST(a_nan_or_infinity_anywhere_reaches_the_norm_on_the_device) {
    for (const int64_t at : {int64_t{0}, int64_t{5000}, int64_t{9999}}) {
        Array array = Array::random(DType::kFloat32, 10000, 1);
        array.set(at, HUGE_VAL);
        CHECK(std::isinf(norms_of({array})[0]));
        array.set(at, std::nan(""));
        CHECK(std::isnan(norms_of({array})[0]));
    }
}

}  // namespace
}  // namespace jointspar
