"""The sampling distribution, compiled by Numba: draws, projection, Algorithm 1. Draws are the bits of every backend."""

from __future__ import annotations

import math

import numpy as np

from jointspar.backends.checked_calls import check_bandit_step, check_draw, check_projection
from jointspar.backends.numba_kernels import compiled

ALL_RANKS = 0xFFFFFFFF  # stands in for the rank in draws that all ranks have in common
BERNOULLI, LAYER_ORDER, OFFSET, RANK_ORDER = range(4)  # purposes: the last word of the counter
FRACTION_BITS = 40  # of the fixed point of coordinated draws
ONE = 1 << FRACTION_BITS

# uint64 throughout: Numba takes uint64 with a plain int for float64.
_WORD_BITS, _LOW_WORD = np.uint64(32), np.uint64(0xFFFFFFFF)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_UNIFORM_SHIFT, _FLOAT_SHIFT = np.uint64(64 - FRACTION_BITS), np.uint64(11)
_BASE_STEP = 32.0  # suffix sums are kept in units of exp of multiples of this


@compiled
def _random_bits(seed: np.uint64, step: np.uint64, rank: np.uint64, index: int, purpose: int) -> np.uint64:
    """Words 0 (low) and 1 (high) of Philox4x32-10 at counter (step, rank, index, purpose) under the key `seed`.

    Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    word0, word1, word2, word3 = step, rank, np.uint64(index), np.uint64(purpose)
    key0, key1 = seed & _LOW_WORD, seed >> _WORD_BITS
    for _ in range(10):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0, word1 = (product1 >> _WORD_BITS) ^ word1 ^ key0, product1 & _LOW_WORD
        word2, word3 = (product0 >> _WORD_BITS) ^ word3 ^ key1, product0 & _LOW_WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW_WORD, (key1 + _KEY_STEPS[1]) & _LOW_WORD
    return word0 | word1 << _WORD_BITS


@compiled
def _random_bits_of_layers(seed: np.uint64, step: np.uint64, rank: np.uint64, count: int, purpose: int) -> np.ndarray:
    bits = np.empty(count, np.uint64)
    for index in range(count):
        bits[index] = _random_bits(seed, step, rank, index, purpose)
    return bits


@compiled
def _rank_position(seed: np.uint64, step: np.uint64, rank: int, world_size: int) -> int:
    """Place of `rank` among all ranks sorted by (random key, rank)."""
    own_key = _random_bits(seed, step, np.uint64(ALL_RANKS), rank, RANK_ORDER)
    position = 0
    for other in range(world_size):
        key = _random_bits(seed, step, np.uint64(ALL_RANKS), other, RANK_ORDER)
        if key < own_key or (key == own_key and other < rank):
            position += 1
    return position


@compiled
def _systematic(fixed: np.ndarray, order: np.ndarray, offset: int) -> np.ndarray:
    """Take each layer where offset + running sum, in this order, passes a whole number; only the fraction is kept."""
    active = np.empty(fixed.size, np.bool_)
    fraction = offset
    for layer in order:
        fraction += fixed[layer]
        active[layer] = fraction >= ONE
        fraction &= ONE - 1
    return active


def sample_layers(
    probabilities: np.ndarray,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    strategy: str,
    draw: str,
    run_length: int | None = None,
) -> np.ndarray:
    """Draw the active layers of one rank, bool [num_layers]; P(active[d]) = probabilities[d], float64 [num_layers].

    The strategies, draws and runs are those of `jointspar.ops.sample_layers`.
    Source: Liu & Mozafari 2022, Algorithm 2; stratified and systematic draws are extensions.
    """
    check_draw(probabilities, seed, step, rank, world_size, strategy, draw, run_length)
    num_layers = len(probabilities)
    seed_bits, step_bits = np.uint64(seed), np.uint64(step)
    stream = (seed_bits, step_bits, np.uint64(rank if strategy == "independent" else ALL_RANKS))
    rotation = 0
    if strategy == "stratified":
        rotation = _rank_position(seed_bits, step_bits, rank, world_size) * ONE // world_size
    if draw == "systematic":
        offset = int(_random_bits(*stream, 0, OFFSET)) >> int(_UNIFORM_SHIFT)
        keys = _random_bits_of_layers(*stream, num_layers, LAYER_ORDER)
        if run_length is not None:
            runs = np.arange(num_layers, dtype=np.uint64) // np.uint64(run_length)
            keys = runs << _WORD_BITS | keys >> _WORD_BITS
        order = np.argsort(keys, kind="stable")
        return _systematic(_fixed_point(probabilities), order, (offset + rotation) % ONE)
    bits = _random_bits_of_layers(*stream, num_layers, BERNOULLI)
    if strategy == "stratified":
        rotated = ((bits >> _UNIFORM_SHIFT).astype(np.int64) + rotation) % ONE
        return rotated < _fixed_point(probabilities)
    return (bits >> _FLOAT_SHIFT) * 2.0**-53 < probabilities


def _fixed_point(probabilities: np.ndarray) -> np.ndarray:
    return np.rint(probabilities * ONE).astype(np.int64)


# --- projection: sorted layers before `first` are at 1, those from `end` on at p_min, those between are free ---------


@compiled
def _base(log_weight: float) -> float:
    return _BASE_STEP * np.floor(log_weight / _BASE_STEP)


@compiled
def _suffix_sums(log_weights: np.ndarray) -> np.ndarray:
    """Sums of the weights from each one on, of descending log weights; the error does not grow with their number.

    Sum k is in units of exp(base(log_weights[k])): no spread overflows or loses the small ones.
    Source: Neumaier 1974, compensated summation.
    """
    sums = np.empty(log_weights.size)
    total, error = 0.0, 0.0
    base = 0.0
    for k in range(log_weights.size - 1, -1, -1):
        new_base = _base(log_weights[k])
        if total > 0.0 and new_base > base:
            factor = math.exp(base - new_base)
            total, error = total * factor, error * factor
        base = new_base
        weight = math.exp(log_weights[k] - base)
        new_total = total + weight
        error += (total - new_total) + weight if total >= weight else (weight - new_total) + total
        total = new_total
        sums[k] = total + error
    return sums


@compiled
def _count_above(log_weights: np.ndarray, anchor: float, level: float, or_equal: bool) -> int:
    """How many of the descending log weights exceed anchor + level."""
    low, high = 0, log_weights.size
    while low < high:
        middle = (low + high) // 2
        difference = log_weights[middle] - anchor
        if difference > level or (or_equal and difference == level):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _clipped_sum(log_weights: np.ndarray, sums: np.ndarray, anchor: float, log_level: float, p_min: float) -> float:
    """Sum of clip(c * w, p_min, 1), with the c that takes the weight exp(anchor) to exp(log_level)."""
    first = _count_above(log_weights, anchor, -log_level, True)
    end = max(first, _count_above(log_weights, anchor, math.log(p_min) - log_level, False))
    total = first + p_min * (log_weights.size - end)
    if first < log_weights.size:
        total += sums[first] * math.exp(_base(log_weights[first]) - anchor + log_level)
    if end < log_weights.size:
        total -= sums[end] * math.exp(_base(log_weights[end]) - anchor + log_level)
    return total


@compiled
def _project(log_weights: np.ndarray, budget: float, p_min: float) -> np.ndarray:
    """The sum of q grows with c: bisect over the c where a layer reaches 1, then over those where it leaves p_min."""
    descending = np.sort(log_weights)[::-1].copy()
    sums = _suffix_sums(descending)
    log_p_min = math.log(p_min)
    first, high = 0, descending.size
    while first < high:
        middle = (first + high) // 2
        if _clipped_sum(descending, sums, descending[middle], 0.0, p_min) <= budget:
            first = middle + 1
        else:
            high = middle
    end, high = first, descending.size
    while end < high:
        middle = (end + high) // 2
        if _clipped_sum(descending, sums, descending[middle], log_p_min, p_min) < budget:
            end = middle + 1
        else:
            high = middle
    q = np.empty(log_weights.size)
    largest_free, largest_q = 0.0, 0.0
    if first < end:
        largest_free = descending[first]
        ratios = _suffix_sums(descending[first:end] - largest_free)[0]  # in units of exp(0)
        largest_q = (budget - first - p_min * (descending.size - end)) / ratios
    for d in range(q.size):
        log_weight = log_weights[d]
        if first > 0 and log_weight >= descending[first - 1]:
            q[d] = 1.0
        elif end < descending.size and log_weight <= descending[end]:
            q[d] = p_min
        else:
            q[d] = min(max(largest_q * math.exp(log_weight - largest_free), p_min), 1.0)
    return q


def project_probabilities(log_weights: np.ndarray, *, budget: float, p_min: float) -> np.ndarray:
    """argmin KL(q || w) over p_min <= q_d <= 1, sum q = budget, exactly: q_d = clip(c * w_d, p_min, 1).

    log_weights: float64 [num_layers], finite; num_layers * p_min <= budget <= num_layers, 0 < p_min <= 1.
    Returns: float64 [num_layers]. Source: Liu & Mozafari 2022, Algorithm 1; KKT conditions.
    """
    check_projection(log_weights, budget, p_min)
    num_layers = len(log_weights)
    if budget >= num_layers:
        return np.ones(num_layers)
    if budget <= p_min * num_layers:
        return np.full(num_layers, p_min)
    return _project(log_weights, float(budget), float(p_min))


@compiled
def _stepped_log_weights(
    probabilities: np.ndarray,
    squared_norms: np.ndarray,
    active: np.ndarray,
    drawn: np.ndarray,
    bound: float,
    ratio: float,
    bandit_lr: float,
    shift: bool,
) -> np.ndarray:
    """log p_d, plus bandit_lr * x^2 / q_d of active layers, x = (|g_d| / L) * ratio / q_d; shifted: of x^2 - 1."""
    log_weights = np.log(probabilities)
    for d in range(log_weights.size):
        if active[d]:
            scaled = math.sqrt(squared_norms[d]) / bound * ratio / drawn[d]
            square = scaled * scaled
            log_weights[d] += bandit_lr * (square - 1.0 if shift else square) / drawn[d]
    return log_weights


def update_probabilities(
    probabilities: np.ndarray,
    squared_norms: np.ndarray,
    active: np.ndarray,
    *,
    drawn_probabilities: np.ndarray,
    gradient_bound: float,
    budget: float,
    p_min: float,
    bandit_lr: float,
    shift: bool,
) -> tuple[np.ndarray, float]:
    """One exponentiated-gradient step on the sampling distribution, then the projection.

    Arguments as in `jointspar.ops.update_probabilities`, vectors [num_layers], gradient_bound L before the step.
    Returns: (float64 [num_layers], L after it); with L = 0 or nothing active the probabilities are unchanged.
    Source: Liu & Mozafari 2022, Algorithm 1.
    """
    check_bandit_step(probabilities, squared_norms, active, drawn_probabilities, gradient_bound, bandit_lr)
    # Norms, not their squares: L^2 may leave the range of float64 where L does not.
    bound = max(math.sqrt(0.99) * gradient_bound, math.sqrt(squared_norms[active].max(initial=0.0)))
    if bound == 0.0 or not active.any():
        return probabilities.copy(), bound
    ratio = p_min if shift else budget / len(probabilities)
    log_weights = _stepped_log_weights(
        probabilities, squared_norms, active, drawn_probabilities, bound, float(ratio), float(bandit_lr), bool(shift)
    )
    return project_probabilities(log_weights, budget=budget, p_min=p_min), bound
