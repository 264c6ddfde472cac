"""What the operations do with values that a device does not look at; see the contracts in csrc/include/jointspar."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import ops
from support import Arrays, bits

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

BANDIT: dict[str, Any] = {"budget": 1.5, "p_min": 0.1, "bandit_lr": 0.05}
LARS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02, "eps": 1e-8}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_layers", [1, 3, 161, 5000])
def test_projecting_a_log_weight_that_is_not_finite_gives_nan_everywhere(
    library: Arrays, bad: float, num_layers: int
) -> None:
    log_weights = np.zeros(num_layers)
    log_weights[num_layers // 2] = bad
    q = ops.project_probabilities(library.array(log_weights, "float64"), budget=0.5 * num_layers, p_min=0.1)
    assert np.isnan(library.float64(q)).all()


@pytest.mark.parametrize("draw", ops.DRAWS)
@pytest.mark.parametrize("strategy", ops.STRATEGIES)
def test_probabilities_of_one_or_more_are_always_drawn_and_those_not_above_zero_never(
    library: Arrays, strategy: str, draw: str
) -> None:
    p = library.array([1.0, 1.5, math.inf, 0.0, -0.5, -math.inf, math.nan], "float64")
    for step in range(50):
        active = ops.sample_layers(p, seed=1, step=step, rank=1, world_size=3, strategy=strategy, draw=draw)
        assert active.tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shift", [False, True])
def test_a_norm_that_is_not_finite_leaves_probabilities_and_bound(library: Arrays, bad: float, shift: bool) -> None:
    p = library.array([0.3, 0.5, 0.7], "float64")
    n2, active = library.array([1.0, bad, 4.0], "float64"), library.bools([True, True, False])
    updated, bound = ops.update_probabilities(p, n2, active, gradient_bound=2.0, shift=shift, **BANDIT)
    assert bits(updated) == bits(p)
    assert float(bound) == 2.0


def test_the_bound_comes_back_as_a_device_array_that_may_be_passed_again(library: Arrays) -> None:
    p, n2 = library.array([0.5] * 3, "float64"), library.array([4.0, 1.0, 0.0], "float64")
    active = library.bools([True, True, False])
    _, first = ops.update_probabilities(p, n2, active, gradient_bound=0.0, **BANDIT)
    assert type(first) is type(p)
    assert tuple(first.shape) == ()
    _, second = ops.update_probabilities(p, n2 * 0.0, active, gradient_bound=first, **BANDIT)
    assert float(first) == 2.0  # an argument is not written
    assert float(second) == pytest.approx(2.0 * math.sqrt(0.99), rel=1e-15)


def test_results_are_device_arrays_of_the_library_of_the_arguments(library: Arrays) -> None:
    x = library.array([3.0, 4.0])
    p = library.array([0.5, 0.5], "float64")
    results = [
        *ops.pack_gradients([x], 1.0),
        ops.squared_norms([x]),
        *ops.lars_update([x], [library.array([0.0, 0.0])], [library.array([1.0, 1.0])], **LARS),
        ops.sample_layers(p, seed=0, step=0),
        ops.project_probabilities(p, budget=1.0, p_min=0.1),
    ]
    assert {type(result) for result in results} == {type(x)}


def test_known_norms_on_the_device_are_used_and_nan_means_measure(library: Arrays) -> None:
    def run(**norms: Any) -> list[float]:
        params, momenta, grads = ([library.array(v, "float64")] for v in ([3.0, 4.0], [0.0, 0.0], [0.0, 2.0]))
        settings = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "trust_coefficient": 0.1, "eps": 0.0}
        known = {name: library.array(value, "float64") for name, value in norms.items()}
        result = ops.lars_update(params, momenta, grads, **settings, adapt=[True], **known)
        return [*library.float64(params[0]).tolist(), *result.grad_norms.tolist()]

    assert run() == pytest.approx([3.0, 3.5, 2.0])  # local = .1 * 5 / 2
    assert run(param_norms=[math.nan], grad_norms=[math.nan]) == run()
    assert run(param_norms=[10.0]) == pytest.approx([3.0, 3.0, 2.0])
    assert run(grad_norms=[1.0]) == pytest.approx([3.0, 3.0, 1.0])


def test_settings_may_be_device_arrays(library: Arrays) -> None:
    grads = [library.array([1.0]), library.array([2.0])]
    packed, _ = ops.pack_gradients(grads, library.array([3.0, 5.0], "float64"))
    assert library.float64(packed).tolist() == [3.0, 10.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skipping_needs_no_host_and_leaves_norms_that_are_known(device: str, value: float) -> None:
    """With known gradient norms the kernels skip too: the norms say that a gradient is not finite."""
    params, momenta = ([torch.full((5000,), 2.0, device=device)] for _ in range(2))
    grads = [torch.full((5000,), value, device=device)]
    known = torch.tensor([value], dtype=torch.float64, device=device)
    norms = ops.lars_update(params, momenta, grads, **LARS, adapt=[True], grad_norms=known, skip_nonfinite=True)
    assert torch.equal(params[0], torch.full_like(params[0], 2.0))
    assert torch.equal(momenta[0], torch.full_like(momenta[0], 2.0))
    assert float(norms.param_norms_after[0]) == pytest.approx(2.0 * math.sqrt(5000), rel=1e-6)
