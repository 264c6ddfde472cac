"""update_probabilities against hand-computed steps, the paper's literal formulas, and a long adversarial run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import backends, ops
from support import Arrays


def update(
    device: str, p: Any, n2: Any, active: Any, *, drawn_probabilities: Any = None, **settings: Any
) -> tuple[np.ndarray, float]:
    """The operation on tensors on `device`, its results on the host."""
    drawn = p if drawn_probabilities is None else drawn_probabilities
    p, n2, drawn = (torch.tensor(np.asarray(values, dtype=np.float64), device=device) for values in (p, n2, drawn))
    active = torch.tensor(np.asarray(active), device=device)
    updated, bound = ops.update_probabilities(p, n2, active, drawn_probabilities=drawn, **settings)
    return updated.cpu().numpy(), float(bound)


def clip_to_budget(weights: np.ndarray, budget: float, p_min: float) -> np.ndarray:
    """clip(c * w, p_min, 1) with sum = budget, c bisected; for weights in the range of float64."""
    low, high = 0.0, 1.0 / weights.min()
    for _ in range(200):
        c = 0.5 * (low + high)
        low, high = (c, high) if np.clip(c * weights, p_min, 1.0).sum() <= budget else (low, c)
    return np.clip(low * weights, p_min, 1.0)


def papers_update(
    p: np.ndarray, n2: np.ndarray, active: np.ndarray, *, bound: float, budget: float, p_min: float, alpha_p: float
) -> np.ndarray:
    """As printed: loss_d = -n2_d / p_d^2 + L^2 / p_min^2 if active, else 0; w_d = p_d exp(-alpha_p loss_d / p_d)."""
    loss = np.where(active, -n2 / p**2 + bound**2 / p_min**2, 0.0)
    return clip_to_budget(p * np.exp(-alpha_p * loss / p), budget, p_min)


def random_step(rng: np.random.Generator) -> dict[str, Any]:
    num_layers, p_min = int(rng.integers(2, 40)), 0.05
    budget = float(rng.uniform(0.1, 0.9) * num_layers)
    return {
        "p": clip_to_budget(rng.uniform(0.2, 5.0, num_layers), budget, p_min),
        "q": clip_to_budget(rng.uniform(0.2, 5.0, num_layers), budget, p_min),
        "n2": 10.0 ** rng.uniform(-4, 4, num_layers),
        "active": rng.random(num_layers) < 0.5,
        "budget": budget,
        "p_min": p_min,
    }


def test_default_step_by_hand(backend: str, device: str) -> None:
    """s/D = q = 1/2 and n2 = L^2: log w_0 grows by bandit_lr * (1/2)^2 / (1/2)^3 = 2 * bandit_lr."""
    p, bound = update(
        device, [0.5, 0.5], [4.0, 0.0], [True, False], gradient_bound=0.0, budget=1.0, p_min=0.1, bandit_lr=0.05
    )
    assert bound == 2.0
    np.testing.assert_allclose(p, [1 / (1 + math.exp(-0.1)), 1 / (1 + math.exp(0.1))], rtol=1e-14)


def test_shifted_step_by_hand(backend: str, device: str) -> None:
    """loss = 1 - (n2 / L^2) * (p_min / q)^2 = 1 - 1/4 * 1/25 = 0.99; log w_0 falls by bandit_lr * 0.99 / (1/2)."""
    p, bound = update(
        device, [0.5, 0.5], [4.0, 0.0], [True, False], gradient_bound=4.0 / math.sqrt(0.99), budget=1.0, p_min=0.1,
        bandit_lr=0.05, shift=True,
    )  # fmt: skip
    assert bound == pytest.approx(4.0, rel=1e-15)
    np.testing.assert_allclose(p, [1 / (1 + math.exp(0.099)), 1 / (1 + math.exp(-0.099))], rtol=1e-14)


def test_drawn_probabilities_are_those_of_the_importance_weight(backend: str, device: str) -> None:
    """q_0 = 1/4: log w_0 = log 1/2 + bandit_lr * (1/2)^2 / (1/4)^3 = log 1/2 + 16 * bandit_lr."""
    p, _ = update(
        device, [0.5, 0.5], [4.0, 0.0], [True, False], gradient_bound=0.0, budget=1.0, p_min=0.1, bandit_lr=0.05,
        drawn_probabilities=[0.25, 0.75],
    )  # fmt: skip
    np.testing.assert_allclose(p, [1 / (1 + math.exp(-0.8)), 1 / (1 + math.exp(0.8))], rtol=1e-14)


def test_default_agrees_with_the_formula_in_weights(backend: str, device: str, rng: np.random.Generator) -> None:
    for _ in range(100):
        step = random_step(rng)
        p, q, n2, active = (step[name] for name in ("p", "q", "n2", "active"))
        bound = math.sqrt(max([0.99 * 5.0, *n2[active]]))
        weights = p * np.exp(active * 0.05 * n2 / bound**2 * (step["budget"] / len(p)) ** 2 / q**3)
        expected = clip_to_budget(weights, step["budget"], step["p_min"]) if active.any() else p
        updated, new_bound = update(
            device, p, n2, active, gradient_bound=math.sqrt(5.0), budget=step["budget"], p_min=step["p_min"],
            bandit_lr=0.05, drawn_probabilities=q,
        )  # fmt: skip
        assert new_bound == pytest.approx(bound, rel=1e-14)
        np.testing.assert_allclose(updated, expected, rtol=1e-12)


def test_shift_is_the_papers_algorithm_1(backend: str, device: str, rng: np.random.Generator) -> None:
    """With bandit_lr = alpha_p * L^2 / p_min^2, where the drawn probabilities are the current ones."""
    for _ in range(100):
        step = random_step(rng)
        p, n2, active, p_min = (step[name] for name in ("p", "n2", "active", "p_min"))
        active[0] = True
        bound = math.sqrt(max([0.99 * 5.0, *n2[active]]))
        alpha_p = 0.3 * p_min**2 / bound**2
        expected = papers_update(p, n2, active, bound=bound, budget=step["budget"], p_min=p_min, alpha_p=alpha_p)
        updated, _ = update(
            device, p, n2, active, gradient_bound=math.sqrt(5.0), budget=step["budget"], p_min=p_min, bandit_lr=0.3,
            shift=True,
        )  # fmt: skip
        np.testing.assert_allclose(updated, expected, rtol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
def test_nothing_active_leaves_p_and_decays_the_bound(backend: str, device: str, shift: bool) -> None:
    p = np.array([0.3, 0.7])
    updated, bound = update(
        device, p, [math.nan, 1e9], [False, False], gradient_bound=2.0, budget=1.0, p_min=0.1, bandit_lr=0.05,
        shift=shift,
    )  # fmt: skip
    np.testing.assert_array_equal(updated, p)
    assert bound == pytest.approx(2.0 * math.sqrt(0.99), rel=1e-15)


@pytest.mark.parametrize("shift", [False, True])
def test_zero_gradients_and_no_bound_leave_p(backend: str, device: str, shift: bool) -> None:
    p = np.array([0.3, 0.7])
    updated, bound = update(
        device, p, [0.0, 0.0], [True, True], gradient_bound=0.0, budget=1.0, p_min=0.1, bandit_lr=0.05, shift=shift
    )
    np.testing.assert_array_equal(updated, p)
    assert bound == 0.0


def test_norms_of_inactive_layers_are_not_read(backend: str, device: str) -> None:
    arguments: dict[str, Any] = {"gradient_bound": 1.0, "budget": 1.5, "p_min": 0.1, "bandit_lr": 0.05}
    p, active = [0.5, 0.5, 0.5], [True, False, True]
    expected = update(device, p, [1.0, 0.0, 2.0], active, **arguments)
    for unread in (math.nan, math.inf, -1.0):
        updated = update(device, p, [1.0, unread, 2.0], active, **arguments)
        np.testing.assert_array_equal(updated[0], expected[0])
        assert updated[1] == expected[1]


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-500, 2.0**500, 2.0**1000])
@pytest.mark.parametrize("shift", [False, True])
def test_a_common_factor_of_all_gradients_changes_nothing(backend: str, device: str, scale: float, shift: bool) -> None:
    """Squared norms near both ends of float64, where L^2 itself would over- or underflow."""
    arguments: dict[str, Any] = {"budget": 1.5, "p_min": 0.1, "bandit_lr": 0.05, "shift": shift}
    n2, active = np.array([1.0, 3.0, 2.0]), [True, False, True]
    expected, bound = update(device, [0.5] * 3, n2, active, gradient_bound=0.5, **arguments)
    scaled, scaled_bound = update(
        device, [0.5] * 3, n2 * scale, active, gradient_bound=0.5 * math.sqrt(scale), **arguments
    )
    np.testing.assert_array_equal(scaled, expected)
    assert scaled_bound == bound * math.sqrt(scale)


def test_the_largest_float64_is_a_valid_squared_norm(backend: str, device: str) -> None:
    largest = np.finfo(np.float64).max
    for bound in (0.0, math.sqrt(largest)):
        updated, new_bound = update(
            device, [0.5, 0.5], [largest, 5e-324], [True, True], gradient_bound=bound, budget=1.0, p_min=0.1,
            bandit_lr=0.05,
        )  # fmt: skip
        assert new_bound == math.sqrt(largest)
        np.testing.assert_allclose(updated, [1 / (1 + math.exp(-0.1)), 1 / (1 + math.exp(0.1))], rtol=1e-14)


@pytest.mark.parametrize(
    ("argument", "replaced"),
    [
        ("probabilities", {"probabilities": [0.0, 1.0]}),
        ("probabilities", {"probabilities": [math.nan, 1.0]}),
        ("drawn_probabilities", {"drawn_probabilities": [0.0, 1.0]}),
        ("drawn_probabilities", {"drawn_probabilities": [1.5, 0.5]}),
        ("squared_norms", {"squared_norms": [1.0, math.nan]}),
        ("squared_norms", {"squared_norms": [math.inf, 1.0]}),
        ("squared_norms", {"squared_norms": [-1.0, 1.0]}),
        ("squared_norms", {"squared_norms": [1.0]}),
        ("active", {"active": [True]}),
        ("drawn_probabilities", {"drawn_probabilities": [0.5]}),
        ("probabilities", {"probabilities": [[0.5, 0.5]]}),
        ("gradient_bound", {"gradient_bound": math.nan}),
        ("gradient_bound", {"gradient_bound": -1.0}),
        ("bandit_lr", {"bandit_lr": math.inf}),
        ("bandit_lr", {"bandit_lr": -0.1}),
        ("budget", {"budget": 3.0}),
        ("p_min", {"p_min": 0.0}),
    ],
)
def test_the_backends_themselves_refuse_bad_arguments(backend: str, argument: str, replaced: dict[str, Any]) -> None:
    half = np.array([0.5, 0.5])
    call: dict[str, Any] = {"probabilities": half, "squared_norms": np.ones(2), "active": np.array([True, True])}
    call |= {"drawn_probabilities": half, "gradient_bound": 1.0, "budget": 1.0, "p_min": 0.1, "bandit_lr": 0.05}
    call |= {name: np.array(value) if isinstance(value, list) else value for name, value in replaced.items()}
    positional = [call.pop(name) for name in ("probabilities", "squared_norms", "active")]
    with pytest.raises(ValueError, match=argument):
        backends.load(backend).update_probabilities(*positional, **call, shift=False)


def test_lists_and_arrays_of_every_library_mean_the_same(backend: str, library: Arrays) -> None:
    settings: dict[str, Any] = {"gradient_bound": 0.0, "budget": 1.0, "p_min": 0.1, "bandit_lr": 0.05}
    p = library.array([0.5, 0.5], "float64")
    for n2, active in (
        ([4.0, 0.0], [True, False]),
        (library.array([4.0, 0.0], "float64"), library.bools([True, False])),
    ):
        updated, bound = ops.update_probabilities(p, n2, active, **settings)
        assert float(bound) == 2.0
        assert type(updated) is type(p)
        np.testing.assert_allclose(library.float64(updated)[0], 1 / (1 + math.exp(-0.1)), rtol=1e-14)


def test_out_may_be_the_input(backend: str, library: Arrays) -> None:
    p = library.array([0.5, 0.5], "float64")
    updated, _ = ops.update_probabilities(
        p, [4.0, 1.0], [True, False], gradient_bound=0.0, budget=1.0, p_min=0.1, bandit_lr=0.05, out=p
    )
    assert updated is p
    np.testing.assert_allclose(library.float64(p)[0], 1 / (1 + math.exp(-0.1)), rtol=1e-14)


def test_out_is_untouched_on_error(backend: str) -> None:
    p = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="squared_norms"):
        ops.update_probabilities(
            p, [math.nan, 1.0], [True, False], gradient_bound=0.0, budget=1.0, p_min=0.1, bandit_lr=0.05, out=p
        )
    np.testing.assert_array_equal(p, [0.5, 0.5])


@pytest.mark.parametrize("other", ["numba", "reference"])
def test_backends_agree_with_native_to_rounding(rng: np.random.Generator, other: str) -> None:
    native, another = backends.load("native"), backends.load(other)
    for index in range(200):
        step = random_step(rng)
        arguments: dict[str, Any] = {"drawn_probabilities": step["q"], "gradient_bound": 10.0 ** rng.uniform(-3, 3)}
        arguments |= {"budget": step["budget"], "p_min": step["p_min"], "bandit_lr": 0.5, "shift": bool(index % 2)}
        ours, bound = native.update_probabilities(step["p"], step["n2"], step["active"], **arguments)
        theirs, other_bound = another.update_probabilities(step["p"], step["n2"], step["active"], **arguments)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert bound == pytest.approx(other_bound, rel=1e-15)


def test_layers_with_larger_gradients_end_with_larger_probabilities(rng: np.random.Generator) -> None:
    """Sampling noise sum n2 / p falls to well below that of uniform probabilities."""
    n2 = np.where(np.arange(20) < 10, 100.0, 1.0)
    p, bound = np.full(20, 0.5), 0.0
    for step in range(2_000):
        active = ops.sample_layers(p, seed=3, step=step)
        noisy = n2 * rng.uniform(0.5, 1.5, 20)
        p, bound = ops.update_probabilities(
            p, noisy, active, gradient_bound=bound, budget=10.0, p_min=0.1, bandit_lr=0.05
        )
    assert p[:10].min() > p[10:].max()
    assert (n2 / p - n2).sum() < 0.5 * (n2 / 0.5 - n2).sum()


@pytest.mark.parametrize("shift", [False, True])
def test_200_000_adversarial_steps_stay_feasible(rng: np.random.Generator, shift: bool) -> None:
    """Spikes, zeros, tiny and huge norms, all or nothing active: p finite, within its bounds, sum p = s."""
    update = backends.load("native").update_probabilities
    num_layers, budget, p_min = 12, 5.0, 0.05
    p, bound, largest_error = np.full(num_layers, budget / num_layers), 0.0, 0.0
    for _ in range(40):
        n2 = 10.0 ** rng.uniform(-300, 300, (5_000, num_layers)) * (rng.random((5_000, num_layers)) < 0.9)
        n2[:2_500] = 10.0 ** rng.uniform(-3, 3, (2_500, num_layers))
        active = rng.random((5_000, num_layers)) < rng.choice([0.0, 0.3, 1.0], (5_000, 1), p=[0.1, 0.6, 0.3])
        rates = 10.0 ** rng.uniform(-3, 4, 5_000)
        for step in range(5_000):
            p, bound = update(
                p, n2[step], active[step], drawn_probabilities=p, gradient_bound=bound, budget=budget, p_min=p_min,
                bandit_lr=float(rates[step]), shift=shift,
            )  # fmt: skip
            largest_error = max(largest_error, abs(math.fsum(p) - budget))
            assert p_min <= p.min() <= p.max() <= 1.0  # false for a NaN too
    assert largest_error < 1e-9
    assert math.isfinite(bound)
