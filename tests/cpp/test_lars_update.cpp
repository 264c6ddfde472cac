#include <omp.h>

#include "check.h"
#include "common/layer_table.h"
#include "jointspar/lars_update.h"

namespace jointspar {
namespace {

LarsTensor lars_tensor(std::vector<float>& param, std::vector<float>& momentum_buffer, const std::vector<float>& grad) {
    const UpdateTensor update{param.data(),
                              momentum_buffer.data(),
                              grad.data(),
                              static_cast<int64_t>(param.size()),
                              DType::kFloat32,
                              DType::kFloat32,
                              0.5,
                              0.5,
                              0.25};
    return {update, 0.1, 0.0, true};
}

TEST(lars_step_by_hand) {
    std::vector<float> param{3.0f, 4.0f};
    std::vector<float> momentum_buffer{1.0f, 0.0f};
    const std::vector<float> grad{0.0f, 1.25f};
    const LarsTensor tensor = lars_tensor(param, momentum_buffer, grad);
    double grad_norm = 0.0;
    double norm_after = 0.0;
    lars_update_cpu(&tensor, 1, {}, nullptr, nullptr, &grad_norm, &norm_after);
    // local = 0.1 * 5 / (1.25 + 0.25 * 5) = 0.2;  d = 0.2 * (0.75, 2.25) = (0.15, 0.45);  u = (0.65, 0.45)
    CHECK_CLOSE(grad_norm, 1.25, 1e-12);
    CHECK_CLOSE(static_cast<double>(momentum_buffer[0]), 0.65, 1e-6);
    CHECK_CLOSE(static_cast<double>(momentum_buffer[1]), 0.45, 1e-6);
    CHECK_CLOSE(static_cast<double>(param[0]), 2.675, 1e-6);
    CHECK_CLOSE(static_cast<double>(param[1]), 3.775, 1e-6);
    CHECK_CLOSE(norm_after, std::hypot(2.675, 3.775), 1e-6);
}

TEST(zero_norms_are_not_adapted) {
    std::vector<float> param{0.0f, 0.0f};
    std::vector<float> momentum_buffer{0.0f, 0.0f};
    const std::vector<float> grad{1.0f, 2.0f};
    const LarsTensor tensor = lars_tensor(param, momentum_buffer, grad);
    double grad_norm = 0.0;
    double norm_after = 0.0;
    lars_update_cpu(&tensor, 1, {}, nullptr, nullptr, &grad_norm, &norm_after);
    CHECK((param == std::vector<float>{-0.5f, -1.0f}));
}

struct Run {
    std::vector<std::vector<float>> params;
    std::vector<double> grad_norms;
    std::vector<double> norms_after;
};

// Sizes that make several groups of measured tensors, with empty ones among them.
Run run_lars(int num_threads) {
    const std::vector<int64_t> sizes{0, 5, 3 * kChunkSize + 1, 0, 400000, 17, 300000, 1};
    Run run;
    std::vector<std::vector<float>> momenta;
    std::vector<std::vector<float>> grads;
    for (const int64_t size : sizes) {
        const auto seed = static_cast<unsigned>(10 + run.params.size());
        run.params.push_back(test::random_floats(size, seed));
        momenta.push_back(test::random_floats(size, seed + 100));
        grads.push_back(test::random_floats(size, seed + 200));
    }
    std::vector<LarsTensor> tensors;
    for (std::size_t k = 0; k < sizes.size(); ++k) {
        tensors.push_back(lars_tensor(run.params[k], momenta[k], grads[k]));
    }
    run.grad_norms.resize(sizes.size());
    run.norms_after.resize(sizes.size());
    omp_set_num_threads(num_threads);
    lars_update_cpu(tensors.data(), static_cast<int64_t>(tensors.size()), {true, false}, nullptr, nullptr,
                    run.grad_norms.data(), run.norms_after.data());
    return run;
}

TEST(lars_has_the_same_bits_for_any_number_of_threads) {
    const int threads_before = omp_get_max_threads();
    const Run serial = run_lars(1);
    for (const int num_threads : {2, 3, 8}) {
        const Run parallel = run_lars(num_threads);
        CHECK(parallel.params == serial.params);
        CHECK(parallel.grad_norms == serial.grad_norms);
        CHECK(parallel.norms_after == serial.norms_after);
    }
    omp_set_num_threads(threads_before);
}

TEST(sgd_is_lars_that_does_not_adapt) {
    std::vector<float> param = test::random_floats(50000, 5);
    std::vector<float> momentum_buffer = test::random_floats(50000, 6);
    const std::vector<float> grad = test::random_floats(50000, 7);
    std::vector<float> other_param = param;
    std::vector<float> other_momentum = momentum_buffer;
    LarsTensor tensor = lars_tensor(param, momentum_buffer, grad);
    tensor.adapt = false;
    double grad_norm = 0.0;
    double norm_after = 0.0;
    lars_update_cpu(&tensor, 1, {}, nullptr, nullptr, &grad_norm, &norm_after);
    const UpdateTensor sgd = lars_tensor(other_param, other_momentum, grad).update;
    double sgd_grad_norm = 0.0;
    sgd_update_cpu(&sgd, 1, false, false, &sgd_grad_norm);
    CHECK(other_param == param);
    CHECK(other_momentum == momentum_buffer);
    CHECK(sgd_grad_norm == grad_norm);
}

}  // namespace
}  // namespace jointspar
