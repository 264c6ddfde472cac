"""What an optimizer measured: bytes, active layers and the time of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Figures of the last step and totals since construction, on this rank.

    `sent_bytes` is what this rank handed to its transport; `dense_bytes` what the same exchange would have sent for all
    layers. Times are wall-clock milliseconds of the last step, by phase.
    """

    steps: int = 0
    skipped_steps: int = 0
    active_fraction: float = 0.0
    sent_bytes: int = 0
    dense_bytes: int = 0
    total_sent_bytes: int = 0
    total_dense_bytes: int = 0
    phase_ms: dict[str, float] = field(default_factory=dict)
    _active_sum: float = 0.0

    @property
    def mean_active_fraction(self) -> float:
        """Active fraction of the layers, averaged over the steps."""
        return self._active_sum / self.steps if self.steps else 0.0

    def add_step(self, *, active_fraction: float, skipped: bool) -> None:
        """Count one finished step, whose sent_bytes and dense_bytes are set."""
        self.steps += 1
        self.skipped_steps += int(skipped)
        self.active_fraction = active_fraction
        self._active_sum += active_fraction
        self.total_sent_bytes += self.sent_bytes
        self.total_dense_bytes += self.dense_bytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step that is under way."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase_ms[name] = (time.perf_counter() - start) * 1e3
