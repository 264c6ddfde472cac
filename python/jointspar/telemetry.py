"""What an optimizer measured: bytes, active layers and the time of each phase."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Figures of the last step and totals since construction, on this rank.

    `exchange` names how the gradients were summed. `sent_bytes` is what this rank handed to its transport;
    `dense_bytes` what the same exchange would have sent for all layers. `weight_grad_flops_skipped` is None until
    `count_flops` was called on the optimizer. Times are wall-clock milliseconds of the last step, by phase;
    with overlap=True of what backward has left to do.
    """

    steps: int = 0
    skipped_steps: int = 0
    active_fraction: float = 0.0
    exchange: str = ""
    sent_bytes: int = 0
    dense_bytes: int = 0
    total_sent_bytes: int = 0
    total_dense_bytes: int = 0
    weight_grad_flops_skipped: int | None = None
    total_weight_grad_flops_skipped: int | None = None
    phase_ms: dict[str, float] = field(default_factory=dict)
    _active_sum: float = 0.0

    @property
    def mean_active_fraction(self) -> float:
        """Active fraction of the layers, averaged over the steps."""
        return self._active_sum / self.steps if self.steps else 0.0

    def add_step(self, *, active_fraction: float, skipped: bool, flops_skipped: int | None) -> None:
        """Count one finished step, whose sent_bytes and dense_bytes are set."""
        self.weight_grad_flops_skipped = flops_skipped
        if flops_skipped is not None:
            self.total_weight_grad_flops_skipped = (self.total_weight_grad_flops_skipped or 0) + flops_skipped
        self.steps += 1
        self.skipped_steps += int(skipped)
        self.active_fraction = active_fraction
        self._active_sum += active_fraction
        self.total_sent_bytes += self.sent_bytes
        self.total_dense_bytes += self.dense_bytes

    def phase(self, name: str) -> Phase:
        """Time a phase of the step that is under way, in a with block."""
        return Phase(self.phase_ms, name)


class Phase:
    """Adds the milliseconds of a with block to an entry."""

    def __init__(self, phase_ms: dict[str, float], name: str) -> None:
        self._phase_ms, self._name = phase_ms, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        elapsed = (time.perf_counter() - self._start) * 1e3
        self._phase_ms[self._name] = self._phase_ms.get(self._name, 0.0) + elapsed
