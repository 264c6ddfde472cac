"""The exact projection of layer weights onto probabilities of a given sum and smallest value."""

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


class ProjectProblem:
    """Random weights, so spread that some layers end at each bound."""

    def __init__(self, case: Case) -> None:
        num_layers = len(case.shapes)
        self.log_weights = np.random.default_rng(1).normal(scale=1.5, size=num_layers)
        self.budget = random_probabilities(num_layers)[1]
        self.inputs = [torch.from_numpy(self.log_weights)]
        self.traffic: Traffic | None = None

    def reset(self) -> None:
        """Nothing is written in place."""

    def check(self, call: Callable[[], Any]) -> None:
        check_projection(call(), self.log_weights, self.budget)


def ours(problem: ProjectProblem) -> Any:
    return ops.project_probabilities(problem.log_weights, budget=problem.budget, p_min=P_MIN)


def projected_by(project: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[ProjectProblem], np.ndarray]:
    return lambda problem: project(problem.log_weights, problem.budget)


PEERS: Sequence[Variant] = [
    Variant("naive", "peer", projected_by(project_by_halving)),
    Variant("numpy_sort", "peer", projected_by(project_by_sorting)),
    Variant("scipy_brentq", "peer", projected_by(project_by_root)),
]
OPERATION = Operation("project_probabilities", layer_cases(), ProjectProblem, [*backends_of(ours), *PEERS])


@pytest.mark.parametrize(("case", "variant"), pytest_cases(OPERATION), ids=pytest_id)
def bench_project_probabilities(benchmark: Any, case: Case, variant: Variant) -> None:
    run_in_pytest(benchmark, OPERATION, case, variant)
