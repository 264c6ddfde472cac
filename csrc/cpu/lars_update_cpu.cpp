#include "jointspar/lars_update.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/lars_math.h"
#include "cpu/norm_chunk.h"
#include "cpu/parallel.h"
#include "cpu/update_chunk.h"

namespace jointspar {
namespace {

// Norms that the caller knows; NaN, or no array: to be measured.
class KnownNorms {
  public:
    explicit KnownNorms(const double* norms) : norms_(norms) {}
    bool has(int64_t tensor) const { return norms_ != nullptr && !std::isnan(norms_[tensor]); }
    double operator[](int64_t tensor) const { return norms_[tensor]; }

  private:
    const double* norms_;
};

// Ends of groups of consecutive tensors. What a thread measured in a group is still in its second-level cache when the
// update reads it again, at the price of two barriers per group. Nothing to measure: one group.
std::vector<int64_t> group_ends(const LarsTensor* tensors, int64_t num_tensors, KnownNorms param_norms,
                                KnownNorms grad_norms) {
    constexpr int64_t kBytesPerThread = int64_t{512} << 10;
    const int64_t group_bytes = kBytesPerThread * omp_get_max_threads();
    std::vector<int64_t> ends;
    int64_t measured_bytes = 0;
    for (int64_t k = 0; k < num_tensors; ++k) {
        const UpdateTensor& update = tensors[k].update;
        if (!param_norms.has(k)) measured_bytes += update.size * element_bytes(update.param_dtype);
        if (!grad_norms.has(k)) measured_bytes += update.size * element_bytes(update.grad_dtype);
        if (measured_bytes < group_bytes && k + 1 < num_tensors) continue;
        ends.push_back(k + 1);
        measured_bytes = 0;
    }
    return ends;
}

class LarsUpdate {
  public:
    LarsUpdate(const LarsTensor* tensors, int64_t num_tensors, const LarsOptions& options, const double* param_norms,
               const double* grad_norms)
        : tensors_(tensors),
          options_(options),
          known_param_norms_(param_norms),
          known_grad_norms_(grad_norms),
          table_(tensors, num_tensors, [](const LarsTensor& tensor) { return tensor.update.size; }),
          group_ends_(options.skip_nonfinite  // every norm is known before anything is written
                          ? std::vector<int64_t>{num_tensors}
                          : group_ends(tensors, num_tensors, known_param_norms_, known_grad_norms_)),
          param_sums_(static_cast<std::size_t>(table_.num_chunks())),
          grad_sums_(param_sums_.size()),
          param_norms_(static_cast<std::size_t>(num_tensors)),
          grad_norms_(param_norms_.size()),
          local_rates_(param_norms_.size()) {}

    void run() {
#pragma omp parallel if (is_parallel(table_.num_elements()))
        {
            int64_t begin = 0;
            for (const int64_t end : group_ends_) {
                measure(begin, end);
#pragma omp barrier
#pragma omp single
                set_local_rates(begin, end);
                if (!is_skipped_) update(begin, end);
                begin = end;
            }
        }
        if (is_skipped_) return;
        for (int64_t k = 0; k < table_.num_slices(); ++k) {
            param_norms_[static_cast<std::size_t>(k)] = std::sqrt(table_.sum_of(k, param_sums_.data()));
        }
    }

    const std::vector<double>& grad_norms() const { return grad_norms_; }
    const std::vector<double>& param_norms() const { return param_norms_; }

  private:
    void measure(int64_t begin, int64_t end) {
        for_each_own_chunk(table_, begin, end, [this](int64_t index, const Chunk& chunk) {
            const UpdateTensor& update = tensors_[chunk.slice].update;
            const auto at = static_cast<std::size_t>(index);
            if (!known_param_norms_.has(chunk.slice)) {
                param_sums_[at] = norm_chunk(update.param, update.param_dtype, chunk.begin, chunk.size);
            }
            if (!known_grad_norms_.has(chunk.slice) && update.grad != nullptr) {
                grad_sums_[at] = norm_chunk(update.grad, update.grad_dtype, chunk.begin, chunk.size);
            }
        });
    }

    void set_local_rates(int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            const LarsTensor& tensor = tensors_[k];
            const auto at = static_cast<std::size_t>(k);
            param_norms_[at] =
                known_param_norms_.has(k) ? known_param_norms_[k] : std::sqrt(table_.sum_of(k, param_sums_.data()));
            grad_norms_[at] =
                known_grad_norms_.has(k) ? known_grad_norms_[k] : std::sqrt(table_.sum_of(k, grad_sums_.data()));
            is_skipped_ = is_skipped_ || (options_.skip_nonfinite && !std::isfinite(grad_norms_[at]));
            local_rates_[at] = tensor.adapt ? lars_local_rate(tensor.trust_coefficient, tensor.update.weight_decay,
                                                              tensor.eps, param_norms_[at], grad_norms_[at])
                                            : 1.0;
        }
    }

    void update(int64_t begin, int64_t end) {
        for_each_own_chunk(table_, begin, end, [this](int64_t index, const Chunk& chunk) {
            const double local_rate = local_rates_[static_cast<std::size_t>(chunk.slice)];
            param_sums_[static_cast<std::size_t>(index)] =
                update_chunk(tensors_[chunk.slice].update, chunk.begin, chunk.size, local_rate, options_.nesterov,
                             false)
                    .params;
        });
    }

    const LarsTensor* tensors_;
    LarsOptions options_;
    KnownNorms known_param_norms_;
    KnownNorms known_grad_norms_;
    LayerTable table_;
    std::vector<int64_t> group_ends_;
    std::vector<double> param_sums_;   // per chunk: of the measured parameters, then of the updated ones
    std::vector<double> grad_sums_;    // stays 0 for missing gradients
    std::vector<double> param_norms_;  // before the update, then after it
    std::vector<double> grad_norms_;
    std::vector<double> local_rates_;
    bool is_skipped_ = false;
};

}  // namespace

void lars_update_cpu(const LarsTensor* tensors, int64_t num_tensors, const LarsOptions& options,
                     const double* param_norms, const double* grad_norms, double* used_grad_norms,
                     double* param_norms_after) {
    LarsUpdate update(tensors, num_tensors, options, param_norms, grad_norms);
    update.run();
    std::copy(update.grad_norms().begin(), update.grad_norms().end(), used_grad_norms);
    std::copy(update.param_norms().begin(), update.param_norms().end(), param_norms_after);
}

}  // namespace jointspar
