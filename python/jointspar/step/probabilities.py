"""Stage 6: gradient norms -> the distribution of the next draws (Algorithm 1 and its alternatives)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jointspar import ops

EMA_DECAY = 0.9
_TINY = 1e-12  # floor of a layer's mean square, relative to the largest


class LayerDistribution:
    """Probabilities of the layers of one rank (or of all, where the strategy shares them).

    Frozen layers have probability 0 and stand outside the budget; a fractional budget is a fraction of the others.

    Args:
        sampling: any object with the fields of `Sampling`.
        num_layers: D.
        eligible: bool [num_layers], layers that may be drawn.
        world_size: number of ranks.
    """

    def __init__(self, sampling: Any, num_layers: int, eligible: np.ndarray, world_size: int = 1) -> None:
        self._sampling, self._world_size = sampling, world_size
        self.eligible = eligible.copy()
        self.gradient_bound = 0.0
        self.norm_ema = np.zeros(num_layers)
        self.norm_count = np.zeros(num_layers, dtype=np.int64)
        self.probabilities = np.zeros(num_layers)
        self._set_constraints()
        self.probabilities[eligible] = min(1.0, self._budget / max(1, int(eligible.sum())))

    @property
    def strategy(self) -> str:
        """How the ranks' draws relate, see `Sampling`."""
        return str(self._sampling.strategy)

    def update(
        self,
        squared_norms: np.ndarray,
        observed: np.ndarray,
        *,
        probabilities_then: np.ndarray | None = None,
        chance: np.ndarray | None = None,
    ) -> None:
        """Learn from the squared norms of the layers that were observed in a step.

        Args:
            squared_norms: float64 [num_layers], of unscaled gradients; read where observed.
            observed: bool [num_layers].
            probabilities_then: float64 [num_layers], the distribution when that step began; default: today's.
            chance: float64 [num_layers], probability of being observed; default: those probabilities.
        """
        seen = observed & self.eligible
        if self._sampling.distribution == "norm":
            self._update_by_norm(squared_norms, seen)
        elif self._sampling.distribution == "bandit":
            then = self.probabilities if probabilities_then is None else probabilities_then
            self._update_by_bandit(squared_norms, seen, then, then if chance is None else chance)

    def set_eligible(self, eligible: np.ndarray) -> None:
        """Take layers out or in (frozen or thawed by the user); the others keep their proportions."""
        newcomers = eligible & ~self.eligible
        self.eligible = eligible.copy()
        self._set_constraints()
        self.probabilities[~eligible] = 0.0
        if not eligible.any():
            return
        known = self.probabilities[eligible & ~newcomers]
        self.probabilities[newcomers] = known.mean() if known.size else 1.0
        self._project(np.log(self.probabilities[eligible]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that later updates depend on."""
        return {
            "probabilities": self.probabilities.copy(),
            "gradient_bound": self.gradient_bound,
            "norm_ema": self.norm_ema.copy(),
            "norm_count": self.norm_count.copy(),
            "eligible": self.eligible.copy(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of another number of layers, or with values that no distribution has."""
        for name in ("probabilities", "norm_ema", "norm_count", "eligible"):
            if name not in state or np.shape(state[name]) != self.probabilities.shape:
                shape = np.shape(state.get(name, ()))
                raise ValueError(f"state has {name} of shape {shape}, not of {self.probabilities.size} layers")
        values = [np.asarray(state[name], dtype=np.float64) for name in ("probabilities", "norm_ema", "norm_count")]
        bound = float(state["gradient_bound"])
        if not all(np.isfinite(value).all() and (value >= 0.0).all() for value in (*values, np.float64(bound))):
            raise ValueError("state has probabilities, norms or a bound that are negative or not finite")
        eligible, probabilities = np.asarray(state["eligible"]).astype(bool), values[0]
        if (probabilities > 1.0).any() or ((probabilities > 0.0) != eligible).any():
            raise ValueError("state has probabilities above 1, or of 0 for layers that may be drawn")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, once `check_state` has passed it."""
        for name in ("probabilities", "norm_ema"):
            setattr(self, name, np.asarray(state[name]).astype(np.float64))
        self.norm_count = np.asarray(state["norm_count"]).astype(np.int64)
        self.eligible = np.asarray(state["eligible"]).astype(bool)
        self.gradient_bound = float(state["gradient_bound"])
        self._set_constraints()
        inside = self.probabilities[self.eligible]
        if self._sampling.distribution == "uniform" and inside.size and np.ptp(inside) > 1e-9:
            self._project(np.zeros(inside.size))  # saved with another distribution
        elif inside.size and (abs(inside.sum() - self._budget) > 1e-9 or inside.min() < self._p_min - 1e-12):
            self._project(np.log(inside))  # saved with another budget or p_min: this optimizer's hold

    def _set_constraints(self) -> None:
        num_frozen = int((~self.eligible).sum())
        self._budget, self._p_min = self._sampling.constraints(
            self.eligible.size, num_frozen, world_size=self._world_size
        )
        self._is_settled = False

    def _update_by_bandit(
        self, squared_norms: np.ndarray, seen: np.ndarray, probabilities_then: np.ndarray, chance: np.ndarray
    ) -> None:
        """The gain has 1/q^3: 1/q^2 is of the loss, 1/q of the chance of seeing it, which may be another than q."""
        inside = self.eligible
        if not inside.any():
            return
        is_own = chance == probabilities_then
        cube_root = np.where(is_own, chance, np.cbrt(np.square(probabilities_then) * chance))
        self.probabilities[inside], self.gradient_bound = ops.update_probabilities(
            self.probabilities[inside],
            squared_norms[inside],
            seen[inside],
            gradient_bound=self.gradient_bound,
            budget=self._budget,
            p_min=self._p_min,
            bandit_lr=self._sampling.bandit_step,
            shift=self._sampling.shift,
            drawn_probabilities=np.where(seen, cube_root, 1.0)[inside],  # read where seen
        )

    def _update_by_norm(self, squared_norms: np.ndarray, seen: np.ndarray) -> None:
        """p proportional to the root of the bias-corrected mean square, which minimises sum ||g_d||^2 / p_d."""
        self.norm_ema[seen] = EMA_DECAY * self.norm_ema[seen] + (1.0 - EMA_DECAY) * squared_norms[seen]
        self.norm_count[seen] += 1
        known = (self.norm_count > 0) & self.eligible
        if self._is_settled or not known.any():
            return
        mean_square = np.zeros_like(self.norm_ema)
        mean_square[known] = self.norm_ema[known] / (1.0 - EMA_DECAY ** self.norm_count[known])
        largest = mean_square.max()
        with np.errstate(over="ignore"):
            mean_square[~known] = min(mean_square[known].mean(), largest)
        if largest > 0.0:
            smallest = max(_TINY * largest, np.finfo(np.float64).tiny)
            self._project(0.5 * np.log(np.maximum(mean_square[self.eligible], smallest)))

    def _project(self, log_weights: np.ndarray) -> None:
        self.probabilities[self.eligible] = ops.project_probabilities(
            log_weights, budget=self._budget, p_min=self._p_min
        )
        count = log_weights.size
        self._is_settled = self._budget >= count or self._budget <= self._p_min * count  # one point is feasible


def observation_chance(strategy: str, drawn_probabilities: np.ndarray, world_size: int) -> np.ndarray:
    """Probability that `observed_norms` sees each layer, float64 [num_layers].

    A stratified draw gives a layer floor or ceil of M p ranks, so somebody sees it with min(1, M p), not p. Without
    this the bandit would prefer small p and settle short of the best distribution.
    """
    return np.minimum(1.0, world_size * drawn_probabilities) if strategy == "stratified" else drawn_probabilities


def observed_norms(
    strategy: str,
    *,
    active: np.ndarray,
    counts: np.ndarray,
    local: np.ndarray,
    gathered: np.ndarray,
    mean_grad: np.ndarray,
    drawn_probabilities: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What Algorithm 1 learns from in each strategy: (squared norms float64 [num_layers], observed bool [num_layers]).

    Args:
        active: bool [num_layers], this rank's.
        counts: int64 [num_layers], ranks that computed each layer.
        local: float64 [num_layers], squared norms of this rank's unscaled gradients.
        gathered: float64 [world_size, num_layers], `local` of every rank (stratified).
        mean_grad: float64 [num_layers], squared norms of the exchanged gradient (shared).
        drawn_probabilities: float64 [num_layers].
    """
    if strategy == "independent":
        return local, active
    if strategy == "stratified":
        return gathered.sum(axis=0) / np.maximum(counts, 1), counts > 0
    return np.square(drawn_probabilities) * mean_grad, active
