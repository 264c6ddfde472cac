"""Draws of layers, and the probabilities that they are drawn with."""

from __future__ import annotations

from typing import Any

import numpy as np

from jointspar.arguments import (
    check_range,
    copy_to,
    device_flags,
    device_scalar,
    device_vector,
    flag,
    flags,
    like,
    number,
    one_of,
    vector,
    whole_number,
)
from jointspar.ops.serving import Array, serving_of

STRATEGIES = ("independent", "stratified", "shared")
DRAWS = ("bernoulli", "systematic")
SMALLEST_PROBABILITY = 1e-100  # its cube, a divisor in Algorithm 1, is a normal number
LARGEST_LOG_WEIGHT = 1e300  # differences stay finite


def sample_layers(
    probabilities: Array,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    strategy: str = "independent",
    draw: str = "systematic",
    run_length: int | None = None,
    out: Array | None = None,
) -> Array:
    """Draw the active layers of one rank; P(active[d]) = probabilities[d], to within 2^-41.

    Random numbers are Philox4x32-10 with counter (step, rank, layer, purpose) and key `seed`, so that a draw depends on
    the arguments alone. "independent": each rank by itself. "stratified": one draw, rotated over the
    ranks, so that floor/ceil(world_size * p) ranks take each layer. "shared": one set for all ranks.
    "systematic" takes floor/ceil(sum p) layers, "bernoulli" each layer independently of the others.

    Args:
        probabilities: float64 [num_layers], in [0, 1].
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**32.
        run_length: 1 <= run_length < 2**32, with draw="systematic" only. None walks the layers in random order, n in
            their own order, shuffled only within runs of n consecutive ones (the last may be shorter). Layers sorted
            by size then give sets that are nearly equal in size over ranks and steps: each stretch of the walk whose
            probabilities sum to one yields exactly one layer. Shuffling within runs keeps the sets random.
        out: bool [num_layers], written and returned.

    Returns: bool [num_layers].
    Source: Liu & Mozafari 2022, Algorithm 2; systematic and stratified draws and runs are extensions.
    """
    serving, place = serving_of(probabilities)
    if place is None:
        p = vector("probabilities", probabilities)
        check_range("probabilities", p, 0.0, 1.0)
    else:
        p = device_vector("probabilities", probabilities, place)
    world_size = whole_number("world_size", world_size, 1, 2**24)
    active = serving.sample_layers(
        p,
        seed=whole_number("seed", seed, 0, 2**64 - 1),
        step=whole_number("step", step, 0, 2**32 - 1),
        rank=whole_number("rank", rank, 0, world_size - 1),
        world_size=world_size,
        strategy=one_of("strategy", strategy, STRATEGIES),
        draw=one_of("draw", draw, DRAWS),
        run_length=None if run_length is None else whole_number("run_length", run_length, 1, 2**32 - 1),
    )
    return copy_to("out", out, active) if out is not None else like(probabilities, active)


def project_probabilities(log_weights: Array, *, budget: float, p_min: float, out: Array | None = None) -> Array:
    """Project weights onto { p_min <= q <= 1, sum q = budget } in the KL divergence, exactly.

    q_d = clip(c * w_d, p_min, 1) with the c for which the sum is `budget` (KKT conditions).

    Args:
        log_weights: float64 [num_layers], log w_d; at most 1e300 in size, any spread.
        budget: expected number of active layers, num_layers * p_min <= budget <= num_layers.
        p_min: in (0, 1].
        out: float64 [num_layers], written and returned.

    Returns: float64 [num_layers].
    Source: Liu & Mozafari 2022, Algorithm 1, projection.
    """
    serving, place = serving_of(log_weights)
    if place is None:
        log_w = vector("log_weights", log_weights)
        check_range("log_weights", log_w, -LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    else:
        log_w = device_vector("log_weights", log_weights, place)
    budget, p_min = _feasible(budget, p_min, len(log_w))
    projected = serving.project_probabilities(log_w, budget=budget, p_min=p_min)
    return copy_to("out", out, projected) if out is not None else like(log_weights, projected)


def update_probabilities(
    probabilities: Array,
    squared_norms: Array,
    active: Array,
    *,
    gradient_bound: float | Array,
    budget: float,
    p_min: float,
    bandit_lr: float,
    shift: bool = False,
    drawn_probabilities: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, float | Array]:
    """One step of Algorithm 1: importance-weighted exponentiated gradient, then the projection.

    L^2 <- max(0.99 L^2, max over active d of ||g_d||^2) first; with L = 0 or nothing active, probabilities stay.

    Args:
        probabilities: float64 [num_layers], in [1e-100, 1].
        squared_norms: float64 [num_layers], ||g_d||^2 of unscaled gradients; read where active.
        active: bool [num_layers].
        gradient_bound: L, not squared; 0 at the start. On a device it comes back as a device array of no dimension,
            which may be passed again.
        bandit_lr: step size; with shift it is the paper's alpha_p * L^2 / p_min^2.
        shift: the paper's literal loss, made non-negative by L^2 / p_min^2.
        drawn_probabilities: float64 [num_layers], what `active` was drawn from; default `probabilities`.
        out: float64 [num_layers], written and returned as the first item.

    Returns: (float64 [num_layers], the new gradient_bound).
    Source: Liu & Mozafari 2022, Algorithm 1.
    """
    drawn_probabilities = probabilities if drawn_probabilities is None else drawn_probabilities
    serving, place = serving_of(probabilities)
    if place is None:
        p, drawn, n2, is_active = _bandit_vectors(probabilities, drawn_probabilities, squared_norms, active)
        bound: Any = number("gradient_bound", gradient_bound)
    else:
        p = device_vector("probabilities", probabilities, place)
        drawn = device_vector("drawn_probabilities", drawn_probabilities, place)
        n2 = device_vector("squared_norms", squared_norms, place)
        is_active = device_flags("active", active, place)
        bound = device_scalar("gradient_bound", gradient_bound, place)
    budget, p_min = _feasible(budget, p_min, len(p))
    updated, bound = serving.update_probabilities(
        p,
        n2,
        is_active,
        drawn_probabilities=drawn,
        gradient_bound=bound,
        budget=budget,
        p_min=p_min,
        bandit_lr=number("bandit_lr", bandit_lr),
        shift=flag("shift", shift),
    )
    bound = bound if place is None else bound.reshape(())
    return (copy_to("out", out, updated) if out is not None else like(probabilities, updated)), bound


def _bandit_vectors(
    probabilities: Any, drawn_probabilities: Any, squared_norms: Any, active: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The vectors of `update_probabilities` on the host, checked."""
    p = vector("probabilities", probabilities)
    check_range("probabilities", p, SMALLEST_PROBABILITY, 1.0)
    drawn = vector("drawn_probabilities", drawn_probabilities, p.size)
    check_range("drawn_probabilities", drawn, SMALLEST_PROBABILITY, 1.0)
    n2 = vector("squared_norms", squared_norms, p.size)
    is_active = flags("active", active, p.size)
    check_range("squared_norms", n2[is_active], 0.0, np.inf)
    return p, drawn, n2, is_active


def _feasible(budget: Any, p_min: Any, num_layers: int) -> tuple[float, float]:
    """Checks 0 < p_min <= budget / num_layers <= 1 up to rounding."""
    budget, p_min = number("budget", budget), number("p_min", p_min)
    tolerance = 1e-9 * max(1.0, budget)
    if not 0.0 < p_min <= 1.0:
        raise ValueError(f"p_min: {p_min} is not in (0, 1]")
    if budget > num_layers + tolerance:
        raise ValueError(f"budget: {budget} of {num_layers} layers is more than all of them")
    if budget < p_min * num_layers - tolerance:
        raise ValueError(f"budget: {budget} is less than p_min * num_layers = {p_min * num_layers}")
    return budget, p_min
