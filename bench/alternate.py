"""Times variants of one operation in alternation: machines drift, so only ratios within one run mean something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def alternate(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int = 1, cold: bool = False
) -> dict[str, float]:
    """Median milliseconds per call of each variant; a round times `repeats` calls of every variant in turn.

    cold: read something larger than the caches before each call, so that no variant pays for what the one before it
    left there to be written back.
    """
    elsewhere = torch.zeros(40_000_000 if cold else 0)
    for call in variants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            elsewhere.sum()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: 1e3 * median(times) for name, times in seconds.items()}


def print_ratios(title: str, medians_ms: Mapping[str, float], *, peers: tuple[str, ...]) -> None:
    """One line per variant: milliseconds, and how often it fits into the fastest of the named peers."""
    best_peer = min(medians_ms[name] for name in peers)
    print(title)
    for name, ms in medians_ms.items():
        print(f"  {name:28s} {ms:9.4f} ms   {best_peer / ms:6.2f}x the best peer")
