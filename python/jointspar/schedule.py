"""Learning-rate schedules for large batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_scaling_warmup(
    optimizer: Optimizer,
    *,
    base_lr: float,
    world_size: int,
    local_batch: int,
    steps_per_epoch: int,
    warmup_epochs: float = 5,
    milestones: Sequence[float] = (30, 50, 70),
    gamma: float = 0.1,
    reference_batch: int = 256,
) -> LambdaLR:
    """Linear scaling, linear warm-up, then steps: Goyal et al. 2017, sections 2.1, 2.2; Liu & Mozafari 2022's steps.

    The rate after the warm-up is peak = base_lr * world_size * local_batch / reference_batch. The warm-up goes linearly
    from base_lr to peak; a global batch of at most `reference_batch` has peak <= base_lr and starts at peak. At
    each milestone (epochs) the rate is multiplied by `gamma`. Call `step()` once after each optimizer step.

    Mutates the `lr` and `initial_lr` of every param group: all have the same rate from then on. The state_dict holds
    plain numbers only, so it can be written as JSON; build the schedule with the same arguments before loading it. On
    another number of ranks, whose epochs have other numbers of steps, build it anew instead and call `step()` as often
    as steps would have been made.
    Raises ValueError naming the argument.
    """
    _check_positive(base_lr=base_lr, world_size=world_size, local_batch=local_batch, gamma=gamma)
    _check_positive(steps_per_epoch=steps_per_epoch, reference_batch=reference_batch)
    if not warmup_epochs >= 0:
        raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
    if any(not epoch > 0 for epoch in milestones) or sorted(milestones) != list(milestones):
        raise ValueError(f"milestones must be positive and ascending, got {tuple(milestones)}")
    peak = base_lr * world_size * local_batch / reference_batch
    factor = _warmup_then_steps(
        start=min(base_lr, peak) / peak,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        milestone_steps=[round(epoch * steps_per_epoch) for epoch in milestones],
        gamma=gamma,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    return LambdaLR(optimizer, factor)


def _warmup_then_steps(
    start: float, warmup_steps: int, milestone_steps: list[int], gamma: float
) -> Callable[[int], float]:
    def factor(step: int) -> float:
        ramp = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        passed = sum(step >= milestone for milestone in milestone_steps)
        return (start + (1.0 - start) * ramp) * gamma**passed

    return factor


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and value != float("inf")):
            raise ValueError(f"{name} must be positive and finite, got {value}")
