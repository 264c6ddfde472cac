#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/argument_checks.h"
#include "jointspar/project_probabilities.h"

namespace jointspar {
namespace {

// Neumaier's compensated sum: the error does not grow with the number of terms.
class CompensatedSum {
  public:
    void add(double value) {
        const double total = sum_ + value;
        error_ += std::fabs(sum_) >= std::fabs(value) ? (sum_ - total) + value : (value - total) + sum_;
        sum_ = total;
    }
    void scale(double factor) {
        sum_ *= factor;
        error_ *= factor;
    }
    double value() const { return sum_ + error_; }

  private:
    double sum_ = 0.0;
    double error_ = 0.0;
};

void check_finite(const double* log_weights, std::int64_t num_layers) {
    for (std::int64_t d = 0; d < num_layers; ++d) {
        if (!std::isfinite(log_weights[d])) {
            throw std::invalid_argument("log_weights[" + std::to_string(d) + "] must be finite");
        }
    }
}

// Log weights in descending order, with the sums of the weights from each one on. Suffix sum k is stored in units of
// exp(base(log weight k)): no spread of the log weights overflows or loses the small ones.
class SortedWeights {
  public:
    using Position = std::vector<double>::const_iterator;

    SortedWeights(const double* log_weights, std::int64_t num_layers)
        : log_weights_(log_weights, log_weights + num_layers), suffix_sums_(log_weights_.size()) {
        std::sort(log_weights_.begin(), log_weights_.end(), std::greater<double>());
        CompensatedSum sum;
        for (std::size_t k = log_weights_.size(); k-- > 0;) {
            const bool is_new_base = k + 1 < log_weights_.size() && base(log_weights_[k]) > base(log_weights_[k + 1]);
            if (is_new_base) sum.scale(std::exp(base(log_weights_[k + 1]) - base(log_weights_[k])));
            sum.add(std::exp(log_weights_[k] - base(log_weights_[k])));
            suffix_sums_[k] = sum.value();
        }
    }

    Position begin() const { return log_weights_.begin(); }
    Position end() const { return log_weights_.end(); }

    // sum over [first, last) of exp(log_level + log weight - anchor), exact to rounding of the sum over [first, end)
    double sum(Position first, Position last, double anchor, double log_level) const {
        return suffix_sum(first, anchor, log_level) - suffix_sum(last, anchor, log_level);
    }

  private:
    static double base(double log_weight) { return 32.0 * std::floor(log_weight / 32.0); }

    double suffix_sum(Position first, double anchor, double log_level) const {
        if (first == end()) return 0.0;
        return suffix_sums_[static_cast<std::size_t>(first - begin())] * std::exp(base(*first) - anchor + log_level);
    }

    std::vector<double> log_weights_;
    std::vector<double> suffix_sums_;
};

// The solution: sorted layers before `first_free` are at 1, those from `end_free` on at p_min, those between are free.
class Projection {
  public:
    Projection(const double* log_weights, std::int64_t num_layers, double budget, double p_min)
        : sorted_(log_weights, num_layers), p_min_(p_min), log_p_min_(std::log(p_min)) {
        // The sum of q grows with c, and each layer has two breakpoints of c: where it leaves p_min and where it
        // reaches 1. Bisection over each kind: a layer is at 1 when the sum at that point is within the budget.
        first_free_ = std::partition_point(sorted_.begin(), sorted_.end(),
                                           [&](double anchor) { return clipped_sum(anchor, 0.0) <= budget; });
        end_free_ = std::partition_point(first_free_, sorted_.end(),
                                         [&](double anchor) { return clipped_sum(anchor, log_p_min_) < budget; });
        if (first_free_ == end_free_) return;  // c is not determined, but q is
        CompensatedSum ratios;
        std::for_each(first_free_, end_free_,
                      [&](double log_weight) { ratios.add(std::exp(log_weight - *first_free_)); });
        scale_ = (budget - fixed_sum(first_free_, end_free_)) / ratios.value();
    }

    double probability(double log_weight) const {
        if (first_free_ != sorted_.begin() && log_weight >= *(first_free_ - 1)) return 1.0;
        if (end_free_ != sorted_.end() && log_weight <= *end_free_) return p_min_;
        return std::clamp(scale_ * std::exp(log_weight - *first_free_), p_min_, 1.0);
    }

  private:
    using Position = SortedWeights::Position;

    // sum of clip(c * w, p_min, 1) over all layers, with the c for which c * exp(anchor) = exp(log_level)
    double clipped_sum(double anchor, double log_level) const {
        const Position first = std::partition_point(
            sorted_.begin(), sorted_.end(), [&](double log_weight) { return log_weight - anchor >= -log_level; });
        const Position end = std::partition_point(
            first, sorted_.end(), [&](double log_weight) { return log_weight - anchor > log_p_min_ - log_level; });
        return fixed_sum(first, end) + sorted_.sum(first, end, anchor, log_level);
    }

    // sum of q over the layers before `first`, at 1, and from `end` on, at p_min
    double fixed_sum(Position first, Position end) const {
        return std::fma(p_min_, static_cast<double>(sorted_.end() - end), static_cast<double>(first - sorted_.begin()));
    }

    SortedWeights sorted_;
    double p_min_;
    double log_p_min_;
    Position first_free_;
    Position end_free_;
    double scale_ = 0.0;  // q of the largest free layer
};

}  // namespace

void project_probabilities_cpu(const double* log_weights, std::int64_t num_layers, double budget, double p_min,
                               double* probabilities) {
    check_budget(num_layers, budget, p_min);
    check_finite(log_weights, num_layers);
    const double count = static_cast<double>(num_layers);
    if (budget >= count || budget <= p_min * count) {
        std::fill(probabilities, probabilities + num_layers, budget >= count ? 1.0 : p_min);
        return;
    }
    const Projection projection(log_weights, num_layers, budget, p_min);
    std::transform(log_weights, log_weights + num_layers, probabilities,
                   [&](double log_weight) { return projection.probability(log_weight); });
}

}  // namespace jointspar
