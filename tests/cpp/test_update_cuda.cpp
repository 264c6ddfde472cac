#include <limits>

#include "device_case.h"
#include "jointspar/lars_update.h"
#include "jointspar/sgd_update.h"

namespace jointspar {
namespace {

using test::Array;
using test::counts_of;
using test::Device;
using test::kDTypes;
using test::kSliceSizes;

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

// A model's arrays; tensor 6 has no gradient, tensor 7 is not adapted.
struct Model {
    std::vector<Array> params;
    std::vector<Array> momenta;
    std::vector<Array> grads;

    Model(DType param_dtype, DType grad_dtype, int64_t skew) {
        for (const int64_t size : kSliceSizes) {
            const auto seed = static_cast<unsigned>(3 * params.size());
            params.push_back(Array::random(param_dtype, size, seed, skew));
            momenta.push_back(Array::random(test::momentum_dtype(param_dtype), size, seed + 1, skew));
            grads.push_back(Array::random(grad_dtype, size, seed + 2));
        }
    }
    int64_t size() const { return static_cast<int64_t>(params.size()); }
    bool operator==(const Model& other) const { return params == other.params && momenta == other.momenta; }

    std::vector<LarsTensor> lars_tensors() {
        std::vector<LarsTensor> tensors;
        for (std::size_t k = 0; k < params.size(); ++k) {
            const UpdateTensor update{params[k].data(),
                                      momenta[k].data(),
                                      k == 6 ? nullptr : grads[k].data(),
                                      params[k].size(),
                                      params[k].dtype(),
                                      grads[k].dtype(),
                                      0.1 + 0.01 * static_cast<double>(k),
                                      0.9,
                                      1e-2};
            tensors.push_back({update, 1e-2, 1e-8, k != 7});
        }
        return tensors;
    }
    std::vector<UpdateTensor> sgd_tensors() {
        std::vector<UpdateTensor> tensors;
        for (const LarsTensor& tensor : lars_tensors()) tensors.push_back(tensor.update);
        return tensors;
    }
};

struct Norms {
    std::vector<double> used_grad_norms;
    std::vector<double> param_norms_after;
    explicit Norms(int64_t count)
        : used_grad_norms(static_cast<std::size_t>(count), -1.0), param_norms_after(used_grad_norms) {}
};

Norms lars_on_cpu(Model& model, const LarsOptions& options, const double* param_norms, const double* grad_norms) {
    Norms norms(model.size());
    lars_update_cpu(model.lars_tensors().data(), model.size(), options, param_norms, grad_norms,
                    norms.used_grad_norms.data(), norms.param_norms_after.data());
    return norms;
}

Norms lars_on_device(Model& model, const LarsOptions& options, const double* param_norms, const double* grad_norms) {
    const Device device;
    Norms norms(model.size());
    lars_update_cuda(model.lars_tensors().data(), model.size(), options, param_norms, grad_norms,
                     norms.used_grad_norms.data(), norms.param_norms_after.data(), device.queue);
    device.synchronize();
    return norms;
}

void check_close(const std::vector<double>& actual, const std::vector<double>& expected) {
    CHECK(actual.size() == expected.size());
    for (std::size_t k = 0; k < actual.size(); ++k) CHECK_CLOSE(actual[k], expected[k], 1e-6);
}

void check_close(const std::vector<Array>& actual, const std::vector<Array>& expected, double tolerance) {
    for (std::size_t k = 0; k < actual.size(); ++k) {
        double largest = 0.0;
        for (int64_t i = 0; i < actual[k].size(); ++i) {
            largest = std::fmax(largest, std::fabs(actual[k][i] - expected[k][i]));
        }
        CHECK(largest <= tolerance);
    }
}

// All but the two norms that are left to measure.
std::vector<double> known_norms(const std::vector<Array>& arrays) {
    std::vector<double> norms;
    for (const Array& array : arrays) norms.push_back(std::sqrt(array.squared_norm()));
    norms[4] = kUnknown;
    norms[10] = kUnknown;
    return norms;
}

TEST(lars_cuda_with_known_norms_has_the_bits_of_the_cpu) {
    for (const DType param_dtype : kDTypes) {
        for (const DType grad_dtype : kDTypes) {
            for (const bool nesterov : {false, true}) {
                Model model(param_dtype, grad_dtype, nesterov ? 1 : 0);
                Model expected = model;
                const std::vector<double> ones(model.params.size(), 1.5);
                const Norms expected_norms = lars_on_cpu(expected, {nesterov, false}, ones.data(), ones.data());
                const Norms norms = lars_on_device(model, {nesterov, false}, ones.data(), ones.data());
                CHECK(model == expected);
                CHECK(norms.used_grad_norms == ones);
                check_close(norms.param_norms_after, expected_norms.param_norms_after);
            }
        }
    }
}

TEST(lars_cuda_measures_what_is_not_known) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
        for (const bool some_are_known : {false, true}) {
            Model model(dtype, dtype, 0);
            Model expected = model;
            const std::vector<double> param_norms = known_norms(model.params);
            const std::vector<double> grad_norms = known_norms(model.grads);
            const double* known_params = some_are_known ? param_norms.data() : nullptr;
            const double* known_grads = some_are_known ? grad_norms.data() : nullptr;
            const Norms expected_norms = lars_on_cpu(expected, {false, true}, known_params, known_grads);
            const Norms norms = lars_on_device(model, {false, true}, known_params, known_grads);
            check_close(norms.used_grad_norms, expected_norms.used_grad_norms);
            check_close(norms.param_norms_after, expected_norms.param_norms_after);
            check_close(model.params, expected.params, 2e-6);
            check_close(model.momenta, expected.momenta, 2e-6);
        }
    }
}

TEST(lars_cuda_may_write_the_norms_that_it_reads) {
    Model model(DType::kFloat32, DType::kFloat32, 0);
    Model other = model;
    std::vector<double> param_norms = known_norms(model.params);
    std::vector<double> grad_norms = known_norms(model.grads);
    const Norms expected = lars_on_device(other, {}, param_norms.data(), grad_norms.data());
    const Device device;
    lars_update_cuda(model.lars_tensors().data(), model.size(), {}, param_norms.data(), grad_norms.data(),
                     grad_norms.data(), param_norms.data(), device.queue);
    device.synchronize();
    CHECK(model == other);
    CHECK(grad_norms == expected.used_grad_norms);
    CHECK(param_norms == expected.param_norms_after);
}

TEST(lars_cuda_skips_all_tensors_where_one_gradient_is_not_finite_and_goes_on_after) {
    const Device device;
    Model model(DType::kFloat32, DType::kFloat32, 0);
    const Model before = model;
    model.grads[10].set(5000, HUGE_VAL);
    Norms norms(model.size());
    lars_update_cuda(model.lars_tensors().data(), model.size(), {false, true}, nullptr, nullptr,
                     norms.used_grad_norms.data(), norms.param_norms_after.data(), device.queue);
    device.synchronize();
    CHECK(model == before);
    CHECK(std::isinf(norms.used_grad_norms[10]));
    for (std::size_t k = 0; k < model.params.size(); ++k) {
        CHECK_CLOSE(norms.param_norms_after[k], std::sqrt(model.params[k].squared_norm()), 1e-6);
    }
    model.grads[10].set(5000, 0.5);
    Model expected = model;
    const Norms expected_norms = lars_on_cpu(expected, {}, nullptr, nullptr);
    lars_update_cuda(model.lars_tensors().data(), model.size(), {false, true}, nullptr, nullptr,
                     norms.used_grad_norms.data(), norms.param_norms_after.data(), device.queue);
    device.synchronize();
    check_close(model.params, expected.params, 2e-6);
    check_close(norms.param_norms_after, expected_norms.param_norms_after);
}

TEST(lars_cuda_skips_by_known_norms_too_and_only_while_one_is_not_finite) {
    const Device device;
    Model model(DType::kFloat32, DType::kFloat32, 0);
    Model expected = model;
    const Model before = model;
    std::vector<double> grad_norms(model.params.size(), 1.5);
    const std::vector<double> param_norms = grad_norms;
    Norms norms(model.size());
    const auto update = [&] {
        lars_update_cuda(model.lars_tensors().data(), model.size(), {false, true}, param_norms.data(),
                         grad_norms.data(), norms.used_grad_norms.data(), norms.param_norms_after.data(), device.queue);
        device.synchronize();
    };
    for (int step = 0; step < 2; ++step) {
        update();
        lars_on_cpu(expected, {}, param_norms.data(), grad_norms.data());
        CHECK(model == expected);
        grad_norms[1] = HUGE_VAL;
        update();
        CHECK(model == expected);
        CHECK(norms.param_norms_after == param_norms);
        grad_norms[1] = 1.5;
    }
    CHECK(!(model == before));
}

TEST(lars_cuda_finds_norms_after_beyond_the_float_range) {
    Array param(DType::kFloat32, 5000);
    Array momentum_buffer(DType::kFloat32, 5000);
    const Array grad(DType::kFloat32, 5000);
    for (int64_t i = 0; i < 5000; ++i) param.set(i, 1e25);
    const UpdateTensor update{
        param.data(), momentum_buffer.data(), grad.data(), 5000, DType::kFloat32, DType::kFloat32, 0, 0, 0};
    const LarsTensor tensor{update, 1.0, 0.0, true};
    const Device device;
    double grad_norm = -1.0;
    double norm_after = -1.0;
    lars_update_cuda(&tensor, 1, {}, nullptr, nullptr, &grad_norm, &norm_after, device.queue);
    device.synchronize();
    CHECK(grad_norm == 0.0);
    CHECK_CLOSE(norm_after, std::sqrt(5000.0) * 1e25, 1e-6);
}

TEST(sgd_cuda_has_the_bits_of_the_cpu) {
    for (const DType param_dtype : kDTypes) {
        for (const DType grad_dtype : kDTypes) {
            for (const bool skip_nonfinite : {false, true}) {
                Model model(param_dtype, grad_dtype, skip_nonfinite ? 1 : 0);
                Model expected = model;
                std::vector<double> norms(model.params.size(), -1.0);
                std::vector<double> expected_norms = norms;
                sgd_update_cpu(expected.sgd_tensors().data(), model.size(), skip_nonfinite, skip_nonfinite,
                               expected_norms.data());
                const Device device;
                sgd_update_cuda(model.sgd_tensors().data(), model.size(), skip_nonfinite, skip_nonfinite, norms.data(),
                                device.queue);
                device.synchronize();
                CHECK(model == expected);
                check_close(norms, expected_norms);
            }
        }
    }
}

TEST(sgd_cuda_skips_where_a_gradient_is_not_finite) {
    const Device device;
    Model model(DType::kBFloat16, DType::kFloat32, 0);
    const Model before = model;
    model.grads[5].set(4000, std::nan(""));
    sgd_update_cuda(model.sgd_tensors().data(), model.size(), false, true, nullptr, device.queue);
    device.synchronize();
    CHECK(model == before);
    sgd_update_cuda(model.sgd_tensors().data(), model.size(), false, false, nullptr, device.queue);
    device.synchronize();
    CHECK(!(model == before));
}

TEST(updates_take_as_many_launches_as_there_are_dtypes) {
    const Device device;
    Model model(DType::kFloat32, DType::kFloat32, 0);
    Norms norms(model.size());
    const auto lars = [&] {
        lars_update_cuda(model.lars_tensors().data(), model.size(), {}, nullptr, nullptr, norms.used_grad_norms.data(),
                         norms.param_norms_after.data(), device.queue);
    };
    const auto sgd = [&](bool skip_nonfinite) {
        sgd_update_cuda(model.sgd_tensors().data(), model.size(), false, skip_nonfinite, nullptr, device.queue);
    };
    CHECK(counts_of(lars).launches == 2);
    CHECK(counts_of([&] { sgd(false); }).launches == 1);
    CHECK(counts_of([&] { sgd(true); }).launches == 2);
    device.synchronize();
}

}  // namespace
}  // namespace jointspar
