#include "jointspar/lars_update.h"

#include <cmath>
#include <vector>

#include "common/lars_math.h"
#include "cpu/norm_chunk.h"
#include "cpu/parallel.h"
#include "cpu/update_chunk.h"

namespace jointspar {
namespace {

bool measures_param(const LarsTensor& tensor) { return std::isnan(tensor.param_norm); }
bool measures_grad(const LarsTensor& tensor) { return std::isnan(tensor.grad_norm); }

// Ends of groups of consecutive tensors. What a thread measured in a group is still in its second-level cache when the
// update reads it again, at the price of two barriers per group. Nothing to measure: one group.
std::vector<int64_t> group_ends(const LarsTensor* tensors, int64_t num_tensors) {
    constexpr int64_t kBytesPerThread = int64_t{512} << 10;
    const int64_t group_bytes = kBytesPerThread * omp_get_max_threads();
    std::vector<int64_t> ends;
    int64_t measured_bytes = 0;
    for (int64_t k = 0; k < num_tensors; ++k) {
        const UpdateTensor& update = tensors[k].update;
        if (measures_param(tensors[k])) measured_bytes += update.size * element_bytes(update.param_dtype);
        if (measures_grad(tensors[k])) measured_bytes += update.size * element_bytes(update.grad_dtype);
        if (measured_bytes < group_bytes && k + 1 < num_tensors) continue;
        ends.push_back(k + 1);
        measured_bytes = 0;
    }
    return ends;
}

class LarsUpdate {
  public:
    LarsUpdate(const LarsTensor* tensors, int64_t num_tensors, bool nesterov, double* grad_norms)
        : tensors_(tensors),
          nesterov_(nesterov),
          grad_norms_(grad_norms),
          table_(tensors, num_tensors, [](const LarsTensor& tensor) { return tensor.update.size; }),
          group_ends_(group_ends(tensors, num_tensors)),
          param_sums_(static_cast<std::size_t>(table_.num_chunks())),
          grad_sums_(param_sums_.size()),
          local_rates_(static_cast<std::size_t>(num_tensors)) {}

    void run(double* param_norms_after) {
#pragma omp parallel if (table_.num_elements() >= kParallelElements)
        {
            int64_t begin = 0;
            for (const int64_t end : group_ends_) {
                measure(begin, end);
#pragma omp barrier
#pragma omp single
                set_local_rates(begin, end);
                update(begin, end);
                begin = end;
            }
        }
        for (int64_t k = 0; k < table_.num_slices(); ++k) {
            param_norms_after[k] = std::sqrt(table_.sum_of(k, param_sums_.data()));
        }
    }

  private:
    void measure(int64_t begin, int64_t end) {
        for_each_own_chunk(table_, begin, end, [this](int64_t index, const Chunk& chunk) {
            const LarsTensor& tensor = tensors_[chunk.slice];
            const UpdateTensor& update = tensor.update;
            const auto at = static_cast<std::size_t>(index);
            if (measures_param(tensor)) {
                param_sums_[at] = norm_chunk(update.param, update.param_dtype, chunk.begin, chunk.size);
            }
            if (measures_grad(tensor) && update.grad != nullptr) {
                grad_sums_[at] = norm_chunk(update.grad, update.grad_dtype, chunk.begin, chunk.size);
            }
        });
    }

    void set_local_rates(int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            const LarsTensor& tensor = tensors_[k];
            const double param_norm =
                measures_param(tensor) ? std::sqrt(table_.sum_of(k, param_sums_.data())) : tensor.param_norm;
            grad_norms_[k] = measures_grad(tensor) ? std::sqrt(table_.sum_of(k, grad_sums_.data())) : tensor.grad_norm;
            local_rates_[static_cast<std::size_t>(k)] =
                tensor.adapt ? lars_local_rate(tensor.trust_coefficient, tensor.update.weight_decay, tensor.eps,
                                               param_norm, grad_norms_[k])
                             : 1.0;
        }
    }

    void update(int64_t begin, int64_t end) {
        for_each_own_chunk(table_, begin, end, [this](int64_t index, const Chunk& chunk) {
            const double local_rate = local_rates_[static_cast<std::size_t>(chunk.slice)];
            param_sums_[static_cast<std::size_t>(index)] =
                update_chunk(tensors_[chunk.slice].update, chunk.begin, chunk.size, local_rate, nesterov_).params;
        });
    }

    const LarsTensor* tensors_;
    bool nesterov_;
    double* grad_norms_;
    LayerTable table_;
    std::vector<int64_t> group_ends_;
    std::vector<double> param_sums_;  // per chunk: of the measured parameters, then of the updated ones
    std::vector<double> grad_sums_;   // stays 0 for missing gradients
    std::vector<double> local_rates_;
};

}  // namespace

void lars_update_cpu(const LarsTensor* tensors, std::int64_t num_tensors, bool nesterov, double* grad_norms,
                     double* param_norms_after) {
    LarsUpdate(tensors, num_tensors, nesterov, grad_norms).run(param_norms_after);
}

}  // namespace jointspar
