"""Vectors of one number a layer, for the three operations on probabilities. Each tensor counts as one layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize

from operation import Case
from shapes import MODELS

P_MIN = 0.1
TOLERANCE = 1e-9
CALLS = 20
MANY_LAYERS = "10000_layers"


def layer_cases() -> list[Case]:
    """As many layers as the models have tensors, and ten thousand."""
    names = ("resnet18", "resnet50", "transformer24")
    shapes = {**{name: MODELS[name] for name in names}, MANY_LAYERS: [(1,)] * 10_000}
    return [Case(name, layers, "float64", CALLS, in_cache=True) for name, layers in shapes.items()]


def random_probabilities(num_layers: int) -> tuple[np.ndarray, float]:
    """float64 [num_layers] from P_MIN to 1, some of them at each end, and their sum, the budget."""
    weights = np.random.default_rng(0).lognormal(sigma=1.5, size=num_layers)
    probabilities = np.clip(0.3 * weights, P_MIN, 1.0)
    return probabilities, float(probabilities.sum())


def check_projection(projected: Any, log_weights: np.ndarray, budget: float) -> None:
    """The conditions that only the exact projection meets: the sum, the bounds, and one factor c for all inside."""
    q = np.asarray(projected, dtype=np.float64)
    assert abs(q.sum() - budget) <= TOLERANCE * budget, f"the sum is {q.sum()}, not {budget}"
    assert (q >= P_MIN * (1 - TOLERANCE)).all() and (q <= 1 + TOLERANCE).all(), "a probability is out of bounds"
    log_c = np.log(q) - log_weights
    is_low, is_high = q <= P_MIN * (1 + TOLERANCE), q >= 1 - TOLERANCE
    inside = log_c[~is_low & ~is_high]
    assert inside.size, "nothing lies between the bounds: choose another case"
    assert np.ptp(inside) <= TOLERANCE, "probabilities between the bounds are not proportional to the weights"
    assert (log_c[is_low] >= inside.min() - TOLERANCE).all(), "one is at p_min that should be more"
    assert (log_c[is_high] <= inside.max() + TOLERANCE).all(), "one is at 1 that should be less"


def project_by_sorting(log_weights: np.ndarray, budget: float) -> np.ndarray:
    """Exact, in NumPy: sum clip(c w, p_min, 1) is piecewise linear in c, with a corner where a layer meets a bound."""
    weights = np.exp(log_weights - log_weights.max())
    corners = np.concatenate([P_MIN / weights, 1.0 / weights])
    order = np.argsort(corners)
    slopes = np.cumsum(np.concatenate([weights, -weights])[order])
    constants = np.cumsum(np.repeat([-P_MIN, 1.0], weights.size)[order]) + P_MIN * weights.size
    piece = max(int(np.searchsorted(constants + slopes * corners[order], budget)) - 1, 0)
    return np.clip((budget - constants[piece]) / slopes[piece] * weights, P_MIN, 1.0)


def project_by_root(log_weights: np.ndarray, budget: float) -> np.ndarray:
    """By SciPy's root finder: log c between all at p_min and all at 1."""
    low, high = np.log(P_MIN) - log_weights.max(), -log_weights.min()
    log_p_min = np.log(P_MIN)

    def excess(log_c: float) -> float:
        return float(np.exp(np.clip(log_weights + log_c, log_p_min, 0.0)).sum()) - budget

    log_c = optimize.brentq(excess, low, high, xtol=1e-13)
    return np.exp(np.clip(log_weights + log_c, log_p_min, 0.0))


def project_by_halving(log_weights: np.ndarray, budget: float) -> np.ndarray:
    """What one writes first: bisection for log c."""
    low, high = np.log(P_MIN) - log_weights.max(), -log_weights.min()
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(np.exp(log_weights + middle), P_MIN, 1.0).sum() < budget:
            low = middle
        else:
            high = middle
    return np.clip(np.exp(log_weights + low), P_MIN, 1.0)
