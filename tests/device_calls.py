"""One call of each operation, as a function of one vector: what tests of streams, graphs and repeatability run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jointspar import ops

SIZE = 3000
SPLIT = (0, 1, 33, 1500, 1466)  # SIZE in slices of uneven size
UPDATE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def pack(x: torch.Tensor) -> list[torch.Tensor]:
    return list(ops.pack_gradients(list(x.split(SPLIT)), [0.5, 2.0, 3.0, 0.1, 1.0]))


def unpack(x: torch.Tensor) -> list[torch.Tensor]:
    outs = [torch.ones_like(part) for part in x.split(SPLIT)]
    ops.unpack_gradients(x, outs, add=True)
    return outs


def add(x: torch.Tensor) -> list[torch.Tensor]:
    total = torch.ones_like(x)
    ops.add_packed(total, x)
    return [total]


def norms(x: torch.Tensor) -> list[torch.Tensor]:
    return [ops.squared_norms(x, layout=SPLIT)]


def lars(x: torch.Tensor) -> list[torch.Tensor]:
    params, momenta = ([torch.ones_like(part) for part in x.split(SPLIT)] for _ in range(2))
    measured = ops.lars_update(params, momenta, x, **UPDATE, trust_coefficient=0.02, eps=1e-8, adapt=[True] * 5)
    return [*params, *momenta, *measured]


def sgd(x: torch.Tensor) -> list[torch.Tensor]:
    params, momenta = ([torch.ones_like(part) for part in x.split(SPLIT)] for _ in range(2))
    return [ops.sgd_update(params, momenta, list(x.split(SPLIT)), **UPDATE), *params, *momenta]


def sample(x: torch.Tensor) -> list[torch.Tensor]:
    p = x.double().abs().clamp(max=1.0)
    return [ops.sample_layers(p, seed=1, step=2, rank=1, world_size=3, strategy="stratified")]


def project(x: torch.Tensor) -> list[torch.Tensor]:
    return [ops.project_probabilities(x.double(), budget=0.4 * SIZE, p_min=0.01)]


def update(x: torch.Tensor) -> list[torch.Tensor]:
    p, active = torch.full_like(x, 0.4, dtype=torch.float64), torch.ones_like(x, dtype=torch.bool)
    bound = torch.full((), 1.5, dtype=torch.float64, device=x.device)
    return list(
        ops.update_probabilities(
            p, x.double().square(), active, gradient_bound=bound, budget=0.4 * SIZE, p_min=0.01, bandit_lr=0.5
        )
    )


CALLS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    call.__name__: call for call in (pack, unpack, add, norms, lars, sgd, sample, project, update)
}
