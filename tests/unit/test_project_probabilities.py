"""project_probabilities against hand-computed cases, two independent solvers, and the KKT conditions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from jointspar import backends, ops
from support import Arrays

SPREADS = (0.0, 1.0, 10.0, 100.0, 1e4)


def project(device: str, log_weights: np.ndarray, budget: float, p_min: float) -> np.ndarray:
    log_w = torch.tensor(log_weights, device=device)
    return ops.project_probabilities(log_w, budget=budget, p_min=p_min).cpu().numpy()


def project_directly(backend: str, log_weights: np.ndarray, budget: float, p_min: float) -> np.ndarray:
    """Without the checks of `ops`."""
    return backends.load(backend).project_probabilities(log_weights, budget=budget, p_min=p_min)


def is_feasible(q: np.ndarray, budget: float, p_min: float) -> bool:
    """Bounds exact, the sum within 1e-12 of the budget."""
    in_bounds = bool((q >= p_min).all() and (q <= 1.0).all())
    return in_bounds and abs(math.fsum(q) - budget) <= 1e-12 * max(1.0, budget)


def random_problem(rng: np.random.Generator, num_layers: int, spread: float) -> tuple[np.ndarray, float, float]:
    """Log weights (smooth, with ties, or on three levels), a budget (often whole) and a p_min."""
    log_weights = (
        rng.uniform(-spread, spread, num_layers),
        rng.normal(0.0, spread, num_layers).round(1),
        rng.choice([-spread, 0.0, spread], num_layers),
    )[rng.integers(3)]
    p_min = float(10.0 ** rng.uniform(-6, 0))
    budget = float(rng.uniform(p_min * num_layers, num_layers))
    if rng.random() < 0.3:
        budget = min(float(num_layers), max(math.ceil(p_min * num_layers), round(budget)))
    return log_weights, budget, p_min


def by_bisection(log_weights: np.ndarray, budget: float, p_min: float) -> np.ndarray:
    """clip(exp(log w + x), p_min, 1), x bisected until its float neighbours; good to the resolution of x."""

    def clipped(x: float) -> np.ndarray:
        return np.exp(np.clip(log_weights + x, math.log(p_min), 0.0))

    low, high = math.log(p_min) - log_weights.max(), -log_weights.min()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if math.fsum(clipped(middle)) <= budget else (low, middle)
    return clipped(low)


def by_enumeration(log_weights: np.ndarray, budget: float, p_min: float) -> np.ndarray:
    """Of all ways to put each layer at p_min, free or 1, the feasible one with the smallest KL divergence."""
    best, best_divergence = None, math.inf
    for state in itertools.product((0, 1, 2), repeat=len(log_weights)):
        states = np.array(state)
        q = np.where(states == 2, 1.0, p_min)
        free = states == 1
        if free.any():
            rest = budget - q[~free].sum()
            if rest <= 0.0:
                continue
            weights = np.exp(log_weights[free] - log_weights[free].max())
            q[free] = rest * weights / weights.sum()
        if abs(q.sum() - budget) > 1e-9 or q.min() < p_min - 1e-12 or q.max() > 1.0 + 1e-12:
            continue
        divergence = float((q * (np.log(q) - log_weights)).sum())
        if divergence < best_divergence:
            best, best_divergence = q, divergence
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("weights", "budget", "p_min", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2.0, 0.1, [0.5, 0.5, 0.5, 0.5]),
        ([4.0, 1.0], 1.0, 0.1, [0.8, 0.2]),  # nothing clipped
        ([100.0, 1.0], 1.0, 0.1, [0.9, 0.1]),  # one at p_min
        ([100.0, 1.0, 1.0], 2.0, 0.1, [1.0, 0.5, 0.5]),  # one at 1
        ([1e6, 3.0, 1.0, 1e-6], 1.9, 0.1, [1.0, 0.6, 0.2, 0.1]),  # both
        ([1e6, 1e-6], 1.1, 0.1, [1.0, 0.1]),  # none free: c is not determined
        ([2.0, 2.0, 1.0], 1.25, 0.25, [0.5, 0.5, 0.25]),  # on a breakpoint
        ([5.0], 0.3, 0.1, [0.3]),
    ],
)
def test_hand_computed_cases(
    backend: str, library: Arrays, weights: list[float], budget: float, p_min: float, expected: list[float]
) -> None:
    log_weights = library.array(np.log(weights), "float64")
    q = ops.project_probabilities(log_weights, budget=budget, p_min=p_min)
    np.testing.assert_allclose(library.float64(q), expected, rtol=1e-14)


def test_the_ends_of_the_feasible_range_are_exact(backend: str, device: str) -> None:
    log_weights = np.array([3.0, -2.0, 0.0])
    for budget in (3.0, 3.0 + 2e-9):
        assert (project(device, log_weights, budget, 0.1) == 1.0).all()
    for budget in (3 * 0.1, 0.3, 0.3 - 9e-10):
        assert (project(device, log_weights, budget, 0.1) == 0.1).all()
    assert (project(device, log_weights, 3.0, 1.0) == 1.0).all()
    assert project(device, np.empty(0), 0.0, 0.5).size == 0


@pytest.mark.parametrize(
    ("argument", "log_weights", "budget", "p_min"),
    [
        ("budget", [0.0, 0.0], 2.1, 0.1),
        ("budget", [0.0, 0.0], 2.0 + 1e-8, 0.1),
        ("budget", [0.0, 0.0], 0.19, 0.1),
        ("budget", [0.0, 0.0], math.nan, 0.1),
        ("budget", [0.0, 0.0], math.inf, 0.1),
        ("budget", [], 0.5, 0.1),
        ("p_min", [0.0, 0.0], 1.0, 0.0),
        ("p_min", [0.0, 0.0], 1.0, -0.1),
        ("p_min", [0.0, 0.0], 1.0, 1.1),
        ("p_min", [0.0, 0.0], 1.0, math.nan),
        ("log_weights", [0.0, math.nan], 1.0, 0.1),
        ("log_weights", [0.0, math.inf], 1.0, 0.1),
        ("log_weights", [0.0, -math.inf], 1.0, 0.1),
        ("log_weights", [[0.0, 0.0]], 1.0, 0.1),
    ],
)
def test_infeasible_or_non_finite_input_is_an_error_naming_the_argument(
    backend: str, argument: str, log_weights: list[float], budget: float, p_min: float
) -> None:
    with pytest.raises(ValueError, match=argument):
        project_directly(backend, np.array(log_weights, dtype=np.float64), budget, p_min)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("num_layers", "num_cases"), [(1, 100), (2, 100), (3, 100), (10, 100), (161, 20), (1000, 4), (100_000, 1)]
)
def test_bounds_are_exact_and_the_sum_is_the_budget(
    backend: str, device: str, rng: np.random.Generator, num_layers: int, num_cases: int, spread: float
) -> None:
    for _ in range(num_cases):
        log_weights, budget, p_min = random_problem(rng, num_layers, spread)
        assert is_feasible(project(device, log_weights, budget, p_min), budget, p_min)


@pytest.mark.parametrize("spread", SPREADS)
def test_agrees_with_bisection(backend: str, device: str, rng: np.random.Generator, spread: float) -> None:
    for num_layers in (2, 10, 161):
        for _ in range(5):
            log_weights, budget, p_min = random_problem(rng, num_layers, spread)
            expected = by_bisection(log_weights, budget, p_min)
            q = project(device, log_weights, budget, p_min)
            if abs(math.fsum(expected) - budget) < 1e-9:  # where log c has the resolution for it
                np.testing.assert_allclose(q, expected, rtol=1e-13 + 1e-15 * spread, atol=1e-9 * spread / 1e4)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_agrees_with_the_enumeration_of_active_sets(
    backend: str, device: str, rng: np.random.Generator, num_layers: int
) -> None:
    for _ in range(30):
        log_weights = rng.normal(0.0, rng.choice([0.1, 1.0, 3.0]), num_layers)
        p_min = float(rng.uniform(0.02, 0.5))
        budget = float(rng.uniform(p_min * num_layers, num_layers))
        expected = by_enumeration(log_weights, budget, p_min)
        np.testing.assert_allclose(project(device, log_weights, budget, p_min), expected, rtol=1e-9)


@pytest.mark.parametrize("other", ["numba", "reference"])
def test_backends_agree_with_native_to_rounding(rng: np.random.Generator, other: str) -> None:
    for num_layers, spread in itertools.product((1, 2, 10, 161), SPREADS):
        for _ in range(5):
            problem = random_problem(rng, num_layers, spread)
            np.testing.assert_allclose(
                project_directly("native", *problem), project_directly(other, *problem), rtol=1e-13
            )


@given(
    log_weights=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12),
    fraction=st.floats(0.0, 1.0),
    p_min=st.floats(1e-9, 1.0),
)
def test_kkt_conditions_hold(
    backend: str, device: str, log_weights: list[float], fraction: float, p_min: float
) -> None:
    """q is a non-decreasing function of log w, and free layers share one c = q / w."""
    log_w = np.array(log_weights)
    budget = p_min * log_w.size + fraction * (log_w.size - p_min * log_w.size)
    assume(p_min * log_w.size <= budget <= log_w.size)
    q = project(device, log_w, budget, p_min)
    assert is_feasible(q, budget, p_min)
    assert (np.diff(q[np.argsort(log_w, kind="stable")]) >= 0.0).all()
    free = (q > p_min * (1 + 1e-12)) & (q < 1.0 - 1e-12)
    if free.any():
        log_c = np.log(q[free]) - log_w[free]
        assert np.ptp(log_c) <= 1e-11


@given(
    log_weights=st.lists(st.integers(-300, 300), min_size=2, max_size=12),
    shift=st.integers(-(10**6), 10**6),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_common_factor_changes_nothing_and_order_does_not_matter(
    backend: str, device: str, log_weights: list[int], shift: int, seed: int
) -> None:
    log_w = np.array(log_weights, dtype=np.float64) / 4.0
    order = np.random.default_rng(seed).permutation(log_w.size)
    q = project(device, log_w, 0.5 * log_w.size, 0.05)
    np.testing.assert_allclose(project(device, log_w + shift, 0.5 * log_w.size, 0.05), q, rtol=1e-12)
    np.testing.assert_allclose(project(device, log_w[order], 0.5 * log_w.size, 0.05), q[order], rtol=1e-12)


def test_no_feasible_neighbour_has_a_smaller_divergence(backend: str, device: str, rng: np.random.Generator) -> None:
    for _ in range(20):
        log_weights, budget, p_min = rng.normal(0.0, 2.0, 8), 3.0, 0.1
        q = project(device, log_weights, budget, p_min)
        smallest = (q * (np.log(q) - log_weights)).sum()
        for source, target in itertools.permutations(range(8), 2):
            step = min(1e-3, q[source] - p_min, 1.0 - q[target])
            neighbour = q.copy()
            neighbour[source] -= step
            neighbour[target] += step
            assert (neighbour * (np.log(neighbour) - log_weights)).sum() >= smallest - 1e-12


def test_a_tiny_p_min_and_weights_beyond_the_range_of_exp_keep_their_ratios(backend: str, device: str) -> None:
    log_weights = np.array([1e4, 2.0, 0.0, -600.0, -1e4])
    q = project(device, log_weights, 1.5, 1e-300)
    assert is_feasible(q, 1.5, 1e-300)
    assert q[0] == 1.0
    assert q[4] == 1e-300
    np.testing.assert_allclose(np.log(q[1:4] / q[1]), [0.0, -2.0, -602.0], rtol=1e-12)


def test_out_may_be_the_input(backend: str, library: Arrays) -> None:
    log_weights = library.array(np.log([4.0, 1.0]), "float64")
    assert ops.project_probabilities(log_weights, budget=1.0, p_min=0.1, out=log_weights) is log_weights
    np.testing.assert_allclose(library.float64(log_weights), [0.8, 0.2], rtol=1e-14)
