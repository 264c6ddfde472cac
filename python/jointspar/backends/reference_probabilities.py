"""The sampling distribution in readable float64 Python: draws, projection, Algorithm 1."""

from __future__ import annotations

import math

import numpy as np

from jointspar.backends.checked_calls import check_bandit_step, check_draw, check_projection

ALL_RANKS = 0xFFFFFFFF  # stands in for the rank in draws that all ranks have in common
BERNOULLI, LAYER_ORDER, OFFSET, RANK_ORDER = range(4)  # purposes: the last word of the counter
ONE = 2**40  # 1.0 in the fixed point of coordinated draws


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 on uint32 [4, n] counters with one key of two 32-bit words; returns uint32 [4, n].

    Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low32 = np.uint64(0xFFFFFFFF)
    word0, word1, word2, word3 = counter.astype(np.uint64)
    key0, key1 = key
    for _ in range(10):
        product0 = word0 * np.uint64(0xD2511F53)
        product1 = word2 * np.uint64(0xCD9E8D57)
        word0 = (product1 >> np.uint64(32)) ^ word1 ^ np.uint64(key0)
        word2 = (product0 >> np.uint64(32)) ^ word3 ^ np.uint64(key1)
        word1, word3 = product1 & low32, product0 & low32
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return np.stack([word0, word1, word2, word3]).astype(np.uint32)


def random_bits(seed: int, step: int, rank: int, count: int, purpose: int) -> np.ndarray:
    """uint64 [count]: words 0 (low) and 1 (high) of the blocks at counters (step, rank, 0..count-1, purpose)."""
    counter = np.empty((4, count), dtype=np.uint32)
    counter[0], counter[1], counter[2], counter[3] = step, rank, np.arange(count), purpose
    words = philox4x32_10(counter, (seed % 2**32, seed >> 32)).astype(np.uint64)
    return words[0] | words[1] << np.uint64(32)


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
    """Draw the active layers of one rank, with P(active[d]) = probabilities[d].

    independent: each rank draws by itself. shared: all ranks draw the same. stratified: one common draw that rank m
    sees with every uniform u replaced by (u + floor(pi(m) * 2^40 / M)) mod 2^40, pi a random permutation of the ranks.
    systematic: one offset for all layers, which are taken in random order. bernoulli: one uniform for each layer.
    run_length: the layers are taken in their own order, shuffled only within runs of so many consecutive ones.

    Args:
        probabilities: float64 [num_layers], in [0, 1].
        seed, step, rank, world_size: 64, 32, 32 and 24 bits.
        run_length: None or in [1, 2^32); None with draw="bernoulli".

    Returns: bool [num_layers].
    Source: Liu & Mozafari 2022, Algorithm 2; stratified and systematic draws are extensions.
    """
    check_draw(probabilities, seed, step, rank, world_size, strategy, draw, run_length)
    num_layers = len(probabilities)
    stream_rank = rank if strategy == "independent" else ALL_RANKS
    rotation = _rank_position(seed, step, rank, world_size) * ONE // world_size if strategy == "stratified" else 0
    fixed = [round(p * ONE) for p in probabilities.tolist()]
    if draw == "systematic":
        offset = int(random_bits(seed, step, stream_rank, 1, OFFSET)[0]) >> 24
        keys = random_bits(seed, step, stream_rank, num_layers, LAYER_ORDER).tolist()
        if run_length is not None:
            keys = [(d // run_length) * 2**32 + (key >> 32) for d, key in enumerate(keys)]
        return _systematic(fixed, keys, (offset + rotation) % ONE)
    bits = random_bits(seed, step, stream_rank, num_layers, BERNOULLI)
    if strategy == "stratified":
        return np.array(
            [((u >> 24) + rotation) % ONE < p for u, p in zip(bits.tolist(), fixed, strict=True)], dtype=bool
        )
    return (bits >> np.uint64(11)) * 2.0**-53 < probabilities


def _rank_position(seed: int, step: int, rank: int, world_size: int) -> int:
    """pi(rank): its place among all ranks sorted by (random key, rank)."""
    keys = random_bits(seed, step, ALL_RANKS, world_size, RANK_ORDER).tolist()
    return sorted(range(world_size), key=lambda m: (keys[m], m)).index(rank)


def _systematic(fixed: list[int], keys: list[int], offset: int) -> np.ndarray:
    """Take each layer where offset + running sum, in the order of the keys, passes a whole number."""
    active = np.zeros(len(fixed), dtype=bool)
    before = offset
    for layer in sorted(range(len(fixed)), key=lambda d: (keys[d], d)):
        after = before + fixed[layer]
        active[layer] = after // ONE > before // ONE
        before = after
    return active


def project_probabilities(log_weights: np.ndarray, *, budget: float, p_min: float) -> np.ndarray:
    """argmin KL(q || w) over p_min <= q_d <= 1, sum q = budget: q_d = clip(c * w_d, p_min, 1).

    Bisection on log c finds which layers are clipped, then c follows from the sum.

    Args:
        log_weights: float64 [num_layers], finite.
        budget: num_layers * p_min <= budget <= num_layers.
        p_min: in (0, 1].

    Returns: float64 [num_layers].
    Source: Liu & Mozafari 2022, Algorithm 1; KKT conditions.
    """
    num_layers = len(log_weights)
    check_projection(log_weights, budget, p_min)
    if budget >= num_layers:
        return np.ones(num_layers)
    if budget <= p_min * num_layers:
        return np.full(num_layers, p_min)
    # A second bisection relative to the layer next to 1 keeps its precision where |log w| is large.
    nearest = log_weights[np.argmin(np.abs(log_weights + _log_c(log_weights, budget, p_min)))]
    with np.errstate(over="ignore"):
        relative = log_weights - nearest
    log_q = relative + _log_c(relative, budget, p_min)
    q = np.where(log_q >= 0.0, 1.0, p_min)
    is_free = (log_q < 0.0) & (log_q > math.log(p_min))
    if is_free.any():
        ratios = np.exp(relative[is_free] - relative[is_free].max())
        c = (budget - math.fsum(q[~is_free])) / math.fsum(ratios)
        q[is_free] = np.clip(c * ratios, p_min, 1.0)
    return q


def _log_c(log_weights: np.ndarray, budget: float, p_min: float) -> float:
    """The largest float log c with sum clip(c * w, p_min, 1) <= budget."""
    log_p_min = math.log(p_min)
    low, high = log_p_min - float(log_weights.max()), -float(log_weights.min())  # all at p_min, all at 1
    middle = low / 2 + high / 2
    while low < middle < high:
        if math.fsum(np.exp(np.clip(log_weights + middle, log_p_min, 0.0))) <= budget:
            low = middle
        else:
            high = middle
        middle = low / 2 + high / 2
    return low


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

    Paper: loss_d = -n2_d / q_d^2 + L^2 / p_min^2 of active layers, else 0; w_d = p_d * exp(-alpha_p * loss_d / q_d).
    shift=True is that with bandit_lr = alpha_p * L^2 / p_min^2. The default leaves the constant L^2 / p_min^2 out and
    scales by (s/D)^2 in its place: log w_d = log p_d + bandit_lr * (n2_d / L^2) * (s/D)^2 / q_d^3.

    Args:
        probabilities: float64 [num_layers], p, in (0, 1].
        squared_norms: float64 [num_layers], n2, of the unscaled gradients; read where active.
        active: bool [num_layers].
        drawn_probabilities: float64 [num_layers], q, what `active` was drawn from.
        gradient_bound: L before the step. L^2 <- max(0.99 L^2, largest active n2) comes first.

    Returns: (float64 [num_layers], L). With L = 0 or nothing active the probabilities are unchanged.
    Source: Liu & Mozafari 2022, Algorithm 1.
    """
    check_bandit_step(probabilities, squared_norms, active, drawn_probabilities, gradient_bound, bandit_lr)
    norms = np.sqrt(squared_norms[active])  # not their squares: L^2 may overflow where L does not
    bound = max([math.sqrt(0.99) * gradient_bound, *norms.tolist()])
    if bound == 0.0 or not active.any():
        return probabilities.copy(), bound
    drawn = drawn_probabilities[active]
    if shift:
        loss = 1.0 - (norms / bound) ** 2 * (p_min / drawn) ** 2
    else:
        loss = -((norms / bound) ** 2) * (budget / len(probabilities) / drawn) ** 2
    log_weights = np.log(probabilities)
    log_weights[active] -= bandit_lr * loss / drawn
    return project_probabilities(log_weights, budget=budget, p_min=p_min), bound
