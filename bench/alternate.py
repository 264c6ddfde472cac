"""Times variants of one operation in alternation: machines drift, so only ratios within one round mean something."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from operation import Case, Problem, Variant

CACHE_FLUSH_BYTES = 160 << 20


class Spread(NamedTuple):
    """Median, 10th and 90th percentile over rounds, and how many rounds there were."""

    median: float
    p10: float
    p90: float
    rounds: int


def spread(values: np.ndarray) -> Spread:
    """Over the values that are not NaN."""
    p10, median, p90 = np.nanpercentile(values, (10, 50, 90)).tolist()
    return Spread(median, p10, p90, int(np.isfinite(values).sum()))


def alternate(
    variants: Sequence[Variant],
    problem: Problem,
    case: Case,
    *,
    rounds: int,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Seconds per call of each variant, float64 [rounds]; NaN in the rounds that a variant sits out (max_rounds).

    A round times every variant once, in an order of its own, so that none always follows the same other one. Before
    each sample, outside of the time, the arrays are put back as they were at first. Then a case beyond the caches reads
    something larger than they are, so that no variant pays for what the one before it left there to be written back or
    profits from what it left there to be read; a case within the caches is called once.
    """
    elsewhere = torch.ones(0 if case.in_cache else CACHE_FLUSH_BYTES // 4)  # ones: zeros might be one shared page
    order = np.random.default_rng(0)
    seconds = {variant.name: np.full(rounds, np.nan) for variant in variants}
    with _no_garbage_collection():
        for turn in range(rounds):
            for index in order.permutation(len(variants)):
                variant = variants[index]
                if variant.max_rounds is None or turn < variant.max_rounds:
                    problem.reset()
                    elsewhere.sum()
                    seconds[variant.name][turn] = _sample(variant, problem, case)
            after_round()
    return seconds


def _sample(variant: Variant, problem: Problem, case: Case) -> float:
    """Mean seconds of a call."""
    with variant.serving():
        if case.in_cache:
            variant.call(problem)
        start = time.perf_counter()
        for _ in range(case.calls):
            variant.call(problem)
        return (time.perf_counter() - start) / case.calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
