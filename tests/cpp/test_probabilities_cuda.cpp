// The probability operations' kernels and launchers, run on the host: the CPU's bits where the contract promises them.
#include <random>

#include "check.h"
#include "cuda_runtime.h"
#include "jointspar/project_probabilities.h"
#include "jointspar/sample_layers.h"
#include "jointspar/update_probabilities.h"

namespace jointspar {
namespace {

const std::vector<int64_t> kNumLayers{1, 2, 31, 32, 33, 161, 256, 257, 1023, 1025, 3000};

DeviceQueue new_queue() { return {0, cuda_on_host::new_stream()}; }

void finish(const DeviceQueue& queue) { cuda_on_host::synchronize(static_cast<cudaStream_t>(queue.stream)); }

std::vector<double> random_doubles(int64_t count, double low, double high, unsigned seed) {
    std::mt19937_64 engine(seed);
    std::uniform_real_distribution<double> uniform(low, high);
    std::vector<double> values(static_cast<std::size_t>(count));
    for (double& value : values) value = uniform(engine);
    return values;
}

TEST(draws_on_a_device_have_the_bits_of_the_cpu) {
    const DeviceQueue queue = new_queue();
    unsigned seed = 0;
    for (const int64_t num_layers : kNumLayers) {
        for (const Strategy strategy : {Strategy::kIndependent, Strategy::kStratified, Strategy::kShared}) {
            for (const Draw draw : {Draw::kBernoulli, Draw::kSystematic}) {
                const std::vector<double> p = random_doubles(num_layers, 0.0, 1.0, ++seed);
                for (const uint64_t run_length : {0u, 1u, 3u, 2000u}) {
                    if (draw == Draw::kBernoulli && run_length != 0) continue;
                    std::vector<uint8_t> expected(p.size());
                    std::vector<uint8_t> found(p.size(), 7);
                    sample_layers_cpu(p.data(), num_layers, 12345 + seed, seed, 2, 5, strategy, draw, run_length,
                                      expected.data());
                    sample_layers_cuda(p.data(), num_layers, 12345 + seed, seed, 2, 5, strategy, draw, run_length,
                                       found.data(), queue);
                    finish(queue);
                    CHECK(found == expected);
                }
            }
        }
    }
}

TEST(projections_on_a_device_are_those_of_the_cpu) {
    const DeviceQueue queue = new_queue();
    for (const int64_t num_layers : kNumLayers) {
        for (const double spread : {0.0, 1.0, 30.0, 1e4}) {
            const std::vector<double> log_w = random_doubles(num_layers, -spread, spread, 17);
            const double budget = 0.4 * static_cast<double>(num_layers);
            std::vector<double> expected(log_w.size());
            std::vector<double> found(log_w.size(), -1.0);
            project_probabilities_cpu(log_w.data(), num_layers, budget, 0.05, expected.data());
            project_probabilities_cuda(log_w.data(), num_layers, budget, 0.05, found.data(), queue);
            finish(queue);
            for (std::size_t d = 0; d < log_w.size(); ++d) CHECK_CLOSE(found[d], expected[d], 1e-11);
        }
    }
}

TEST(updates_of_probabilities_on_a_device_are_those_of_the_cpu) {
    const DeviceQueue queue = new_queue();
    for (const int64_t num_layers : kNumLayers) {
        const double budget = 0.5 * static_cast<double>(num_layers);
        std::vector<double> p(static_cast<std::size_t>(num_layers), 0.5);
        const std::vector<double> n2 = random_doubles(num_layers, 0.0, 9.0, 3);
        std::vector<uint8_t> active(p.size());
        for (std::size_t d = 0; d < p.size(); ++d) active[d] = d % 2 == 0;
        for (const bool shift : {false, true}) {
            const BanditParams params{budget, 0.1, 0.05, shift};
            std::vector<double> expected(p.size());
            std::vector<double> found(p.size(), -1.0);
            double bound = 2.0;
            const double expected_bound = update_probabilities_cpu(p.data(), p.data(), n2.data(), active.data(),
                                                                   num_layers, bound, params, expected.data());
            update_probabilities_cuda(p.data(), p.data(), n2.data(), active.data(), num_layers, &bound, params,
                                      found.data(), queue);
            finish(queue);
            CHECK_CLOSE(bound, expected_bound, 1e-14);
            for (std::size_t d = 0; d < p.size(); ++d) CHECK_CLOSE(found[d], expected[d], 1e-11);
        }
    }
}

}  // namespace
}  // namespace jointspar
