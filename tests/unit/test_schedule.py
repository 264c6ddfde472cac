"""linear_scaling_warmup against hand-computed rates."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from jointspar.schedule import linear_scaling_warmup


def make_optimizer(num_groups: int = 1) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 7.0 + k} for k in range(num_groups)]
    return torch.optim.SGD(groups, lr=7.0)


def rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def paper_schedule(optimizer: torch.optim.Optimizer, **changes: object) -> torch.optim.lr_scheduler.LRScheduler:
    settings: dict = dict(base_lr=0.1, world_size=8, local_batch=1024, steps_per_epoch=2) | changes
    return linear_scaling_warmup(optimizer, **settings)


def test_warms_up_linearly_from_base_lr_to_the_scaled_rate() -> None:
    optimizer = make_optimizer()
    seen = rates(optimizer, paper_schedule(optimizer), 12)
    assert seen[0] == pytest.approx(0.1)
    assert seen[5] == pytest.approx(0.1 + 0.5 * (3.2 - 0.1))
    assert seen[10] == seen[11] == pytest.approx(3.2)
    assert [b - a for a, b in pairwise(seen[:11])] == pytest.approx([0.31] * 10)


def test_multiplies_by_gamma_at_each_milestone() -> None:
    optimizer = make_optimizer()
    seen = rates(optimizer, paper_schedule(optimizer), 180)
    assert (seen[59], seen[60]) == pytest.approx((3.2, 0.32))
    assert (seen[99], seen[100]) == pytest.approx((0.32, 0.032))
    assert (seen[139], seen[140], seen[179]) == pytest.approx((0.032, 0.0032, 0.0032))


def test_without_warm_up_starts_at_the_scaled_rate() -> None:
    optimizer = make_optimizer()
    assert rates(optimizer, paper_schedule(optimizer, warmup_epochs=0), 1) == pytest.approx([3.2])


def test_small_global_batch_scales_down_and_never_exceeds_its_rate() -> None:
    optimizer = make_optimizer()
    seen = rates(optimizer, paper_schedule(optimizer, world_size=1, local_batch=64), 20)
    assert seen == pytest.approx([0.025] * 20)


def test_sets_every_param_group() -> None:
    optimizer = make_optimizer(num_groups=2)
    paper_schedule(optimizer, warmup_epochs=0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3.2, 3.2])


def test_resumes_from_a_state_dict_that_went_through_json() -> None:
    whole = make_optimizer()
    expected = rates(whole, paper_schedule(whole), 80)
    first = make_optimizer()
    scheduler = paper_schedule(first)
    rates(first, scheduler, 33)
    optimizer_state, scheduler_state = first.state_dict(), json.loads(json.dumps(scheduler.state_dict()))
    second = make_optimizer()
    resumed = paper_schedule(second)
    second.load_state_dict(optimizer_state)
    resumed.load_state_dict(scheduler_state)
    assert rates(second, resumed, 47) == pytest.approx(expected[33:], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_lr", 0.0), ("base_lr", float("nan")), ("world_size", 0), ("local_batch", -1), ("steps_per_epoch", 0),
        ("warmup_epochs", -1), ("milestones", (30, 20)), ("milestones", (0,)), ("gamma", 0), ("reference_batch", 0),
    ],
)  # fmt: skip
def test_bad_argument_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        paper_schedule(make_optimizer(), **{name: value})
