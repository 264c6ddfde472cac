"""Stage 1: probabilities -> active, the layers that this rank computes in this step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np

from jointspar import ops
from jointspar.arguments import flag, one_of, whole_number

_BANDIT_LR = 0.05
DISTRIBUTIONS = ("bandit", "norm", "uniform")


@dataclass(frozen=True)
class Sampling:
    """How layers are drawn, and how the distribution that they are drawn from is learnt.

    Args:
        budget: expected number of active layers; an int is a count, a float <= 1 a fraction of the sampled layers.
        p_min: smallest probability; None: min(0.1, share / 2.5), share being the budget over the number of layers,
            but with distribution="norm" and one draw for all ranks at least 1 / world_size ("stratified", where some
            rank then computes each layer in every step) or 1 ("shared"), or the share where that is less: then all
            layers have the same probability, and nothing is learnt (one rank, two at budget 0.5, "shared" always).
        strategy: "independent" (the paper: every rank its own distribution and draw), "stratified" (one distribution,
            one draw rotated over the ranks) or "shared" (one distribution, one set for all ranks).
        draw: "systematic" (floor or ceil of budget layers each time, of nearly equal size in all) or "bernoulli" (the
            paper: layers independent).
        distribution: "bandit" (the paper's Algorithm 1), "norm" (proportional to the gradient norms) or "uniform".
        bandit_lr: step size of Algorithm 1; None: 0.05.
        shift: the paper's literal non-negative loss in Algorithm 1, not with strategy="stratified" or dense_steps,
            where a layer is observed with another chance than its probability.
        lag: 1 learns from each step one step later, so that nothing waits for norms that a device still computes; a
            skipped step is then counted one step later too.
        dense_steps: so many first steps compute every layer, and the distribution learns from the norms of all.
        seed: key of the random numbers; the same on all ranks.
        grouping: "module" or "tensor", see `group_layers`. The budget counts layers: with "tensor" and "norm" large
            matrices have probabilities near 1 and biases p_min, so that little is saved.

    Source: Liu & Mozafari 2022, Algorithms 1 and 2. Extensions: "stratified", "shared", "systematic", "norm", lag,
    dense_steps.
    """

    budget: float = 0.5
    p_min: float | None = None
    strategy: str = "stratified"
    draw: str = "systematic"
    distribution: str = "norm"
    bandit_lr: float | None = None
    shift: bool = False
    lag: int = 0
    dense_steps: int = 0
    seed: int = 0
    grouping: str = "module"

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                object.__setattr__(self, field.name, value.item())
        one_of("strategy", self.strategy, ops.STRATEGIES)
        one_of("draw", self.draw, ops.DRAWS)
        one_of("distribution", self.distribution, DISTRIBUTIONS)
        one_of("grouping", self.grouping, ("module", "tensor"))
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)):
            raise TypeError(f"budget: expected a count (int) or a fraction (float), got {self.budget!r}")
        if isinstance(self.budget, float) and not 0.0 < self.budget <= 1.0:
            raise ValueError(f"budget: the fraction {self.budget} is not in (0, 1]; a count of layers is an int")
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(f"budget: a count of layers is at least 1, got {self.budget}")
        _check_number("p_min", 1.0 if self.p_min is None else self.p_min)
        _check_number("bandit_lr", self.bandit_step)
        if self.p_min is not None and not 0.0 < self.p_min <= 1.0:
            raise ValueError(f"p_min: {self.p_min} is not in (0, 1]")
        if not (self.bandit_step >= 0.0 and np.isfinite(self.bandit_step)):
            raise ValueError(f"bandit_lr: {self.bandit_lr} is not finite and at least 0")
        if flag("shift", self.shift) and (self.strategy == "stratified" or self.dense_steps):
            raise ValueError("shift: is for strategy='independent' or 'shared' without dense_steps")
        whole_number("lag", self.lag, 0, 1)
        whole_number("dense_steps", self.dense_steps, 0, 2**62)
        whole_number("seed", self.seed, 0, 2**64 - 1)
        idle = [name for name, acts in self._acting().items() if not acts]
        if idle:
            raise ValueError(f"{idle[0]}: does not act with distribution={self.distribution!r}; leave it out")

    @property
    def bandit_step(self) -> float:
        """`bandit_lr`, or what stands for None."""
        return _BANDIT_LR if self.bandit_lr is None else self.bandit_lr

    def _acting(self) -> dict[str, bool]:
        """Whether each setting that was given acts with this distribution."""
        return {
            "p_min": self.distribution != "uniform" or self.p_min is None,
            "bandit_lr": self.distribution == "bandit" or self.bandit_lr is None,
            "shift": self.distribution == "bandit" or not self.shift,
        }

    @classmethod
    def paper(cls, budget: float, **overrides: Any) -> Sampling:
        """The paper's literal choices: tensors as layers, independent Bernoulli draws, Algorithm 1 with its shift."""
        choices: dict[str, Any] = dict(
            strategy="independent", draw="bernoulli", distribution="bandit", shift=True, grouping="tensor"
        )
        return cls(budget=budget, **(choices | overrides))

    def constraints(self, num_layers: int, num_frozen: int = 0, *, world_size: int = 1) -> tuple[float, float]:
        """(budget as a number of layers, p_min) for `num_layers` of which some are frozen and cannot be drawn.

        Raises ValueError for a count above num_layers, or a p_min above the budget's share a layer.
        """
        if isinstance(self.budget, int) and self.budget > num_layers:
            raise ValueError(f"budget: {self.budget} layers of {num_layers} is more than all of them")
        drawable = num_layers - num_frozen
        if drawable == 0:
            return 0.0, 1.0
        expected = self.budget * drawable if isinstance(self.budget, float) else float(min(self.budget, drawable))
        share = expected / drawable
        if self.p_min is None:
            return expected, self._default_p_min(share, world_size)
        if self.p_min > share * (1.0 + 1e-9) and not num_frozen:
            raise ValueError(f"p_min: {self.p_min} is more than the budget's share of {share:.4g} a layer")
        return expected, min(self.p_min, share)

    def _default_p_min(self, share: float, world_size: int) -> float:
        """A layer that nobody computes stands still, and the rarer one is computed the more 1/p amplifies its noise."""
        low = min(0.1, share / 2.5)
        if self.distribution != "norm" or self.strategy == "independent":
            return low
        by_some_rank = 1.0 if self.strategy == "shared" else 1.0 / world_size
        return max(low, min(share, by_some_rank))


def probabilities_to_draw(probabilities: np.ndarray, sampling: Sampling, step: int) -> np.ndarray:
    """What the layers of a step are drawn from, float64 [num_layers]: while `dense_steps` last, ones."""
    return np.sign(probabilities) if step < sampling.dense_steps else probabilities.copy()


def draw_layers(
    probabilities: np.ndarray, sampling: Sampling, *, sizes: np.ndarray, step: int, rank: int, world_size: int
) -> np.ndarray:
    """The active layers of this rank, bool [num_layers]; a layer of probability 0 (frozen) is never drawn.

    A systematic draw takes one of every few layers that lie next to each other: here those of nearly equal size, so
    that ranks and steps have nearly equal amounts to compute and send. Shuffled are those of which one is expected.
    sizes: int64 [num_layers], elements.
    """
    active = np.zeros(probabilities.size, dtype=bool)
    order = np.argsort(-sizes, kind="stable")
    order = order[probabilities[order] > 0.0]
    drawn = probabilities[order]
    run_length = max(2, round(drawn.size / max(drawn.sum(), 1.0)))
    active[order] = ops.sample_layers(
        drawn,
        seed=sampling.seed,
        step=step,
        rank=rank,
        world_size=world_size,
        strategy=sampling.strategy,
        draw=sampling.draw,
        run_length=run_length if sampling.draw == "systematic" else None,
    )
    return active


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name}: is too large for a float") from None
