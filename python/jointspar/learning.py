"""What a step teaches the distribution of the next draws, kept until it can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jointspar.device_arrays import Reading
from jointspar.step.probabilities import LayerDistribution, observation_chance, observed_norms


@dataclass
class Lesson:
    """One step's draw and norms. Its readings may still be on their way from the device."""

    active: np.ndarray  # bool [num_layers], this rank's
    drawn: np.ndarray  # float64 [num_layers], the probabilities that they were drawn from
    probabilities: np.ndarray  # float64 [num_layers], the distribution then: the same, but while `dense_steps` last
    counts: np.ndarray  # int64 [num_layers], ranks that computed each layer
    world_size: int
    local: Reading  # float64 [num_layers], squared norms of this rank's unscaled gradients
    mean: Reading | None = None  # float64 [num_layers], squared norms of the mean gradient; None: not measured
    used: Reading | None = None  # float64 [num_slices], norms that decided on the update; None: nobody measured them
    is_finite: bool = True  # as far as the host was told; the norms tell the rest

    def was_applied(self) -> bool:
        """Whether the update found all gradients finite, the same on all ranks; waits for the norms."""
        return self.is_finite and self.used is not None and bool(np.isfinite(self.used.wait()).all())

    def teach(self, distribution: LayerDistribution, gathered: np.ndarray) -> None:
        """Update the distribution, from a step that was applied; waits for the norms.

        gathered: float64 [world_size, num_layers], `local` of every rank.
        """
        assert self.mean is not None
        if not np.isfinite(self.mean.wait()).all():  # the user mended what was exchanged
            return
        strategy = distribution.strategy
        squared_norms, observed = observed_norms(
            strategy,
            active=self.active,
            counts=self.counts,
            local=self.local.wait(),
            gathered=gathered,
            mean_grad=self.mean.wait(),
            drawn_probabilities=self.drawn,
        )
        if not np.isfinite(squared_norms[observed]).all():  # the exchange mended them
            return
        chance = observation_chance(strategy, self.drawn, len(gathered))
        distribution.update(squared_norms, observed, probabilities_then=self.probabilities, chance=chance)

    def is_of(self, num_layers: int) -> bool:
        """Whether its arrays are of so many layers, and hold what a step can have left."""
        local, mean = self.local.wait(), np.zeros(0) if self.mean is None else self.mean.wait()
        if any(value.shape != (num_layers,) for value in (*self._arrays(), local, mean)):
            return False
        was_drawn = self.active | (self.counts != 0)
        both = np.stack([self.drawn, self.probabilities])
        is_drawable = ((both > 0.0) | ~was_drawn) & (both >= 0.0) & (both <= 1.0)
        return bool(is_drawable.all() and not ((local < 0.0) | (mean < 0.0)).any())

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.active, self.drawn, self.probabilities, self.counts

    def state_dict(self) -> dict[str, torch.Tensor]:
        arrays = dict(zip(("active", "drawn", "probabilities", "counts"), self._arrays(), strict=True))
        arrays["local"] = self.local.wait()
        arrays["world_size"] = np.array(self.world_size)
        arrays["mean"] = np.full(self.drawn.size, np.nan) if self.mean is None else self.mean.wait()
        arrays["used"] = np.full(1, np.nan) if self.used is None else self.used.wait()
        arrays["is_finite"] = np.array(self.is_finite)
        return {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Lesson:
        """From `state_dict`, whose arrays have one entry a layer."""
        return cls(
            active=np.asarray(state["active"]).astype(bool),
            drawn=np.asarray(state["drawn"]).astype(np.float64),
            probabilities=np.asarray(state.get("probabilities", state["drawn"])).astype(np.float64),  # earlier ones
            counts=np.asarray(state["counts"]).astype(np.int64),
            world_size=int(state["world_size"]),
            local=Reading(np.asarray(state["local"]).astype(np.float64)),
            mean=Reading(np.asarray(state["mean"]).astype(np.float64)),
            used=Reading(np.asarray(state["used"]).astype(np.float64)),
            is_finite=bool(state["is_finite"]),
        )
