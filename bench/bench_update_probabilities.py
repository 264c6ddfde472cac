"""One step of Algorithm 1: an exponentiated gradient on the layers' probabilities, then the projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import ops
from layer_problem import (
    P_MIN,
    check_projection,
    layer_cases,
    project_by_halving,
    project_by_root,
    project_by_sorting,
    random_probabilities,
)
from operation import Case, Operation, Traffic, Variant, backends_of, pytest_cases, pytest_id, run_in_pytest

BANDIT_LR = 0.05
Projection = Callable[[np.ndarray, float], np.ndarray]


class BanditProblem:
    """Probabilities with the norms of a drawn set of layers."""

    def __init__(self, case: Case) -> None:
        num_layers = len(case.shapes)
        random = np.random.default_rng(1)
        self.probabilities, self.budget = random_probabilities(num_layers)
        self.squared_norms = random.lognormal(size=num_layers)
        self.active = random.random(num_layers) < self.probabilities
        self.gradient_bound = 0.5
        vectors = (self.probabilities, self.squared_norms, self.active)
        self.inputs = [torch.from_numpy(vector) for vector in vectors]
        self.traffic: Traffic | None = None

    def reset(self) -> None:
        """Nothing is written in place."""

    def check(self, call: Callable[[], Any]) -> None:
        updated, bound = call()
        right_bound = max(np.sqrt(0.99) * self.gradient_bound, np.sqrt(self.squared_norms[self.active].max()))
        assert abs(bound - right_bound) <= 1e-12 * right_bound, f"the bound is {bound}, not {right_bound}"
        log_weights = np.log(self.probabilities)
        factor = BANDIT_LR * (self.budget / self.probabilities.size / right_bound) ** 2
        for layer in np.flatnonzero(self.active):
            log_weights[layer] += factor * self.squared_norms[layer] / self.probabilities[layer] ** 3
        check_projection(updated, log_weights, self.budget)


def ours(problem: BanditProblem) -> Any:
    return ops.update_probabilities(
        problem.probabilities, problem.squared_norms, problem.active, gradient_bound=problem.gradient_bound,
        budget=problem.budget, p_min=P_MIN, bandit_lr=BANDIT_LR,
    )  # fmt: skip


def updated_with(project: Projection) -> Callable[[BanditProblem], tuple[np.ndarray, float]]:
    """The step in NumPy, over all layers at once, and a projection."""

    def update(problem: BanditProblem) -> tuple[np.ndarray, float]:
        gains = np.where(problem.active, problem.squared_norms, 0.0)
        squared_bound = max(0.99 * problem.gradient_bound**2, float(gains.max()))
        relative_budget = problem.budget / gains.size
        gains *= BANDIT_LR * relative_budget**2 / squared_bound
        gains /= problem.probabilities**3
        gains += np.log(problem.probabilities)
        return project(gains, problem.budget), squared_bound**0.5

    return update


PEERS: Sequence[Variant] = [
    Variant("naive", "peer", updated_with(project_by_halving)),
    Variant("numpy_sort", "peer", updated_with(project_by_sorting)),
    Variant("scipy_brentq", "peer", updated_with(project_by_root)),
]
OPERATION = Operation("update_probabilities", layer_cases(), BanditProblem, [*backends_of(ours), *PEERS])


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_update_probabilities(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
