// The exact projection q_d = clip(c * w_d, p_min, 1), sum q = budget, by one block of threads: no sort, no scratch.
//
// The sum of q grows with c and, between the points where a layer leaves p_min or reaches 1 (breakpoints), linearly.
// So c is known once it is known which layers are at 1, which at p_min and which are free. The search for that keeps a
// bracket of two levels of c. It tries Newton's step, which is exact once it stays on one linear piece, and where that
// does not settle it, a random breakpoint inside the bracket. Each breakpoint tried leaves the bracket for good, so the
// search ends whatever the values are, after about 2 ln(2 num_layers) of them on average.
//
// Block: see block.h.
#pragma once

#include "common/block.h"
#include "common/portable.h"

namespace jointspar {

// A level of c, by the unclipped log q that it gives a layer of log weight `anchor`. Near the anchor this resolves c
// to the last bit, however large the log weights are.
struct Level {
    double anchor;
    double log_q;

    JOINTSPAR_HOST_DEVICE double log_q_of(double log_weight) const { return (log_weight - anchor) + log_q; }
    // log(c here / c there)
    JOINTSPAR_HOST_DEVICE double above(const Level& other) const {
        return (other.anchor - anchor) + (log_q - other.log_q);
    }
};

// What clip(c * w, p_min, 1) adds up to.
struct ClippedSum {
    double free;  // sum of the q strictly between p_min and 1
    int64_t num_one;
    int64_t num_min;

    JOINTSPAR_HOST_DEVICE ClippedSum operator+(const ClippedSum& other) const {
        return ClippedSum{free + other.free, num_one + other.num_one, num_min + other.num_min};
    }
    JOINTSPAR_HOST_DEVICE bool same_sets(const ClippedSum& other) const {
        return num_one == other.num_one && num_min == other.num_min;
    }
    // What is left of the budget for the free layers.
    JOINTSPAR_HOST_DEVICE double rest(double budget, double p_min) const {
        return budget - fma(p_min, static_cast<double>(num_min), static_cast<double>(num_one));
    }
};

// Either all log weights are finite or there is one that is not.
struct LogWeightRange {
    double smallest;
    double largest;
    int64_t num_not_finite;
};

struct BreakpointPick {
    uint64_t key;   // random: the smallest is taken
    int64_t index;  // 2 * layer where the layer reaches 1, 2 * layer + 1 where it leaves p_min; -1 for none
};

// Finalizer of splitmix64 (Steele et al. 2014): any two inputs give unrelated bits.
JOINTSPAR_HOST_DEVICE inline uint64_t scramble(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

template <class Block>
class ProjectionBlock {
  public:
    JOINTSPAR_DEVICE ProjectionBlock(const Block& block, const double* log_weights, int64_t num_layers, double budget,
                                     double p_min)
        : block_(block),
          log_weights_(log_weights),
          num_layers_(num_layers),
          budget_(budget),
          p_min_(p_min),
          log_p_min_(log(p_min)) {}

    // probabilities may be the memory of the log weights. All NaN where a log weight is not finite.
    JOINTSPAR_DEVICE JOINTSPAR_INLINE void write(double* probabilities) {
        const LogWeightRange range = find_range();
        const auto count = static_cast<double>(num_layers_);
        if (range.num_not_finite > 0) {
            fill(probabilities, nan(""));
        } else if (budget_ >= count) {
            fill(probabilities, 1.0);
        } else if (budget_ <= p_min_ * count) {
            fill(probabilities, p_min_);
        } else {
            find_bracket(range);
            write_solution(probabilities);
        }
    }

  private:
    static constexpr int kNewtonRounds = 16;
    static constexpr int kMaxRounds = 256;  // never reached: work is bounded even if rounding led in a circle
    static constexpr double kRounding = 0x1.0p-50;

    template <class Visit>
    JOINTSPAR_DEVICE JOINTSPAR_INLINE void for_each_own_layer(Visit visit) const {
        for (int64_t d = block_.thread(); d < num_layers_; d += block_.num_threads()) visit(d);
    }

    JOINTSPAR_DEVICE JOINTSPAR_INLINE void fill(double* probabilities, double value) const {
        for_each_own_layer([&](int64_t d) { probabilities[d] = value; });
    }

    JOINTSPAR_DEVICE JOINTSPAR_INLINE LogWeightRange find_range() const {
        LogWeightRange own{kLargestDouble, -kLargestDouble, 0};
        for_each_own_layer([&](int64_t d) {
            const double log_weight = log_weights_[d];
            own.smallest = fmin(own.smallest, log_weight);
            own.largest = fmax(own.largest, log_weight);
            own.num_not_finite += !isfinite(log_weight);
        });
        return block_.reduce(own, [](const LogWeightRange& a, const LogWeightRange& b) {
            return LogWeightRange{fmin(a.smallest, b.smallest), fmax(a.largest, b.largest),
                                  a.num_not_finite + b.num_not_finite};
        });
    }

    // c where nothing would be clipped.
    JOINTSPAR_DEVICE JOINTSPAR_INLINE Level unclipped_level(double anchor) const {
        double own = 0.0;
        for_each_own_layer([&](int64_t d) { own += exp(log_weights_[d] - anchor); });
        return Level{anchor, log(budget_ / block_.reduce(own, Add()))};
    }

    JOINTSPAR_DEVICE JOINTSPAR_INLINE ClippedSum clipped_sum(const Level& level) const {
        ClippedSum own{0.0, 0, 0};
        for_each_own_layer([&](int64_t d) {
            const double log_q = level.log_q_of(log_weights_[d]);
            if (log_q >= 0.0) {
                ++own.num_one;
            } else if (log_q <= log_p_min_) {
                ++own.num_min;
            } else {
                own.free += exp(log_q);
            }
        });
        return block_.reduce(own, Add());
    }

    JOINTSPAR_DEVICE static ClippedSum no_sets() { return ClippedSum{0.0, -1, -1}; }

    // Ends with the solution on or between low_ and high_ and no breakpoint strictly between them.
    JOINTSPAR_DEVICE JOINTSPAR_INLINE void find_bracket(const LogWeightRange& range) {
        low_ = Level{range.largest, log_p_min_};
        high_ = Level{range.smallest, 0.0};
        Level level = unclipped_level(range.largest);
        ClippedSum newton_from = no_sets();
        for (int round = 0; round < kMaxRounds; ++round) {
            const ClippedSum sum = clipped_sum(level);
            const double rest = sum.rest(budget_, p_min_);
            if (sum.same_sets(newton_from) || fabs(rest - sum.free) <= kRounding * budget_) {
                low_ = high_ = level;
                return;
            }
            (sum.free < rest ? low_ : high_) = level;
            const Level newton{level.anchor, level.log_q + log(rest / sum.free)};  // not inside where none is free
            const bool is_inside = newton.above(low_) > 0.0 && high_.above(newton) > 0.0;
            if (round < kNewtonRounds && is_inside) {
                newton_from = sum;
                level = newton;
            } else {
                newton_from = no_sets();
                if (!pick_breakpoint(round, level)) return;
            }
        }
    }

    // A random breakpoint strictly between low_ and high_; false where there is none.
    JOINTSPAR_DEVICE JOINTSPAR_INLINE bool pick_breakpoint(int round, Level& level) const {
        BreakpointPick own{0, -1};
        for_each_own_layer([&](int64_t d) {
            const double low = low_.log_q_of(log_weights_[d]);
            const double high = high_.log_q_of(log_weights_[d]);
            if (low < 0.0 && high > 0.0) own = smaller_key(own, candidate(2 * d, round));
            if (low < log_p_min_ && high > log_p_min_) own = smaller_key(own, candidate(2 * d + 1, round));
        });
        const BreakpointPick pick =
            block_.reduce(own, [](const BreakpointPick& a, const BreakpointPick& b) { return smaller_key(a, b); });
        if (pick.index < 0) return false;
        level = Level{log_weights_[pick.index / 2], pick.index % 2 == 0 ? 0.0 : log_p_min_};
        return true;
    }

    // Keys of one round differ: the pick does not depend on the order in which threads are combined.
    JOINTSPAR_DEVICE static JOINTSPAR_INLINE BreakpointPick candidate(int64_t index, int round) {
        return BreakpointPick{scramble(static_cast<uint64_t>(index) + (static_cast<uint64_t>(round) << 48)), index};
    }

    JOINTSPAR_DEVICE static JOINTSPAR_INLINE BreakpointPick smaller_key(const BreakpointPick& a,
                                                                        const BreakpointPick& b) {
        if (a.index < 0) return b;
        return b.index >= 0 && b.key < a.key ? b : a;
    }

    // All layers that are at 1 at low_ stay there, all that are at p_min at high_ too.
    JOINTSPAR_DEVICE bool is_one(double log_weight) const { return low_.log_q_of(log_weight) >= 0.0; }
    JOINTSPAR_DEVICE bool is_min(double log_weight) const { return high_.log_q_of(log_weight) <= log_p_min_; }

    JOINTSPAR_DEVICE JOINTSPAR_INLINE double largest_free() const {
        double own = -kLargestDouble;
        for_each_own_layer([&](int64_t d) {
            const double log_weight = log_weights_[d];
            if (!is_one(log_weight) && !is_min(log_weight)) own = fmax(own, log_weight);
        });
        return block_.reduce(own, Largest());
    }

    // Closed form: q of a free layer = rest / (sum over the free of w) * w, weights in units of the largest free one.
    JOINTSPAR_DEVICE JOINTSPAR_INLINE void write_solution(double* probabilities) const {
        const double anchor = largest_free();
        ClippedSum own{0.0, 0, 0};
        for_each_own_layer([&](int64_t d) {
            const double log_weight = log_weights_[d];
            if (is_one(log_weight)) {
                ++own.num_one;
            } else if (is_min(log_weight)) {
                ++own.num_min;
            } else {
                own.free += exp(log_weight - anchor);
            }
        });
        const ClippedSum ratios = block_.reduce(own, Add());
        const double scale = ratios.rest(budget_, p_min_) / ratios.free;  // q of the largest; NaN where none is free
        for_each_own_layer([&](int64_t d) {
            const double log_weight = log_weights_[d];
            if (is_one(log_weight)) {
                probabilities[d] = 1.0;
            } else if (is_min(log_weight)) {
                probabilities[d] = p_min_;
            } else {
                probabilities[d] = fmin(fmax(scale * exp(log_weight - anchor), p_min_), 1.0);
            }
        });
    }

    const Block& block_;
    const double* log_weights_;
    int64_t num_layers_;
    double budget_;
    double p_min_;
    double log_p_min_;
    Level low_{};
    Level high_{};
};

}  // namespace jointspar
