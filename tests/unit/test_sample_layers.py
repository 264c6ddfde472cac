"""sample_layers: Philox's published answers, one stream of bits for all backends, marginals, counts, unbiasedness."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from jointspar import backends, ops
from jointspar.backends import reference_probabilities
from jointspar.step.packing import gradient_scales
from support import Arrays

STRATEGIES = ("independent", "stratified", "shared")
DRAWS = ("bernoulli", "systematic")
DRAWS_AND_RUNS = [("bernoulli", None), ("systematic", None), ("systematic", 1), ("systematic", 2), ("systematic", 4)]
every_kind = pytest.mark.parametrize(("strategy", "draw"), list(itertools.product(STRATEGIES, DRAWS)))


def sample(device: str, probabilities: np.ndarray, **arguments: Any) -> np.ndarray:
    """The operation on a tensor on `device`, its result on the host."""
    return ops.sample_layers(torch.tensor(probabilities, device=device), **arguments).cpu().numpy()


def draw_many(
    probabilities: np.ndarray,
    num_steps: int,
    world_size: int,
    strategy: str,
    draw: str,
    run_length: int | None = None,
) -> np.ndarray:
    """bool [num_steps, world_size, num_layers] from the native backend."""
    sample = backends.load("native").sample_layers
    common = {"seed": 20220717, "world_size": world_size, "strategy": strategy, "draw": draw, "run_length": run_length}
    drawn_ranks = 1 if strategy == "shared" else world_size
    active = np.empty((num_steps, drawn_ranks, len(probabilities)), dtype=bool)
    for step, rank in itertools.product(range(num_steps), range(drawn_ranks)):
        active[step, rank] = sample(probabilities, step=step, rank=rank, **common)
    return np.broadcast_to(active, (num_steps, world_size, len(probabilities)))


def probabilities_with(p_min: float) -> np.ndarray:
    """Six layers from p_min to exactly 1, with a sum that is no whole number."""
    return np.array([p_min, p_min, 0.9 * p_min + 0.1, 0.5 * p_min + 0.5, 0.2 * p_min + 0.77, 1.0])


def is_floor_or_ceil(counts: np.ndarray, expected: np.ndarray | float) -> bool:
    """Whether every count is `expected` rounded down or up; fixed point moves a whole number by 2^-40 a layer."""
    slack = 1e-9
    return bool((counts >= np.floor(expected + slack)).all() and (counts <= np.ceil(expected - slack)).all())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    words = reference_probabilities.philox4x32_10(np.array([counter], dtype=np.uint32).T, key)
    assert " ".join(f"{word:08x}" for word in words[:, 0]) == expected


@every_kind
@pytest.mark.parametrize("other", ["numba", "reference"])
def test_backends_draw_the_bits_of_native(rng: np.random.Generator, strategy: str, draw: str, other: str) -> None:
    native, another = backends.load("native"), backends.load(other)
    run_lengths = (None, 1, 2, 3, 100, 2**32 - 1) if draw == "systematic" else (None,)
    for num_layers, world_size, run_length in itertools.product((0, 1, 2, 7, 64, 161), (1, 2, 3, 8, 100), run_lengths):
        p = rng.choice([0.0, 1.0, 0.5, 1 / 3, 2.0**-41, *rng.uniform(0, 1, 8)], num_layers)
        arguments = {
            "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
            "step": int(rng.integers(0, 2**32)),
            "rank": int(rng.integers(0, world_size)),
            "world_size": world_size,
            "strategy": strategy,
            "draw": draw,
            "run_length": run_length,
        }
        np.testing.assert_array_equal(native.sample_layers(p, **arguments), another.sample_layers(p, **arguments))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("strategy", "draw", "run_length", "expected"),
    [
        ("independent", "bernoulli", None, "1001111010111101 0011100100001111"),
        ("independent", "systematic", None, "0010000011011111 0000011110001111"),
        ("independent", "systematic", 3, "0000010111011101 0001000100111111"),
        ("stratified", "bernoulli", None, "0001101111101001 0101100101101111"),
        ("stratified", "systematic", None, "0011010110100011 0000000110111111"),
        ("stratified", "systematic", 3, "0000010010111111 0001000111011011"),
        ("shared", "bernoulli", None, "0000000110101111 0101100101101111"),
        ("shared", "systematic", None, "0001001100011111 0000000110111111"),
        ("shared", "systematic", 3, "0001000011101111 0001000111011011"),
    ],
)
def test_the_stream_of_a_seed_never_changes(
    library: Arrays, strategy: str, draw: str, run_length: int | None, expected: str
) -> None:
    p = library.array(np.linspace(0.05, 0.95, 16), "float64")
    common = {"seed": 2**63 + 5, "rank": 3, "world_size": 5, "strategy": strategy, "draw": draw}
    drawn = [ops.sample_layers(p, step=step, run_length=run_length, **common) for step in (0, 2**32 - 1)]
    assert " ".join("".join("01"[int(active)] for active in layers) for layers in drawn) == expected


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("run_length", [1, 2, 3, 11, 12, 2**32 - 1])
def test_layers_are_walked_run_by_run_and_within_a_run_by_the_upper_halves_of_their_keys(
    device: str, run_length: int
) -> None:
    sixteenths = np.array([3, 8, 16, 5, 0, 11, 1, 15, 8, 8, 2])
    for step in range(20):
        offset = int(reference_probabilities.random_bits(9, step, 1, 1, reference_probabilities.OFFSET)[0]) >> 24
        bits = reference_probabilities.random_bits(9, step, 1, 11, reference_probabilities.LAYER_ORDER).tolist()
        runs = [range(11)[first : first + run_length] for first in range(0, 11, run_length)]
        order = [layer for run in runs for layer in sorted(run, key=lambda layer: bits[layer] >> 32)]
        sums = offset + np.cumsum([0, *sixteenths[order].tolist()]) * 2**36
        expected = np.empty(11, bool)
        expected[order] = np.diff(sums // 2**40) > 0
        active = sample(device, sixteenths / 16, seed=9, step=step, rank=1, world_size=2, run_length=run_length)
        np.testing.assert_array_equal(active, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_of_every_two_neighbours_of_p_one_half_is_taken(device: str, strategy: str) -> None:
    """Unshuffled, it is the first of all pairs or the second of all; shuffled, each pair has its own."""
    sides = {1: set(), 2: set()}
    for run_length, step, rank in itertools.product((1, 2), range(10), range(3)):
        at = {"seed": 4, "step": step, "rank": rank, "world_size": 3, "strategy": strategy}
        pairs = sample(device, np.full(64, 0.5), **at, run_length=run_length).reshape(-1, 2)
        assert (pairs.sum(axis=1) == 1).all()
        sides[run_length].add(int(pairs[:, 0].sum()))
    assert sides[1] == {0, 32}
    assert 0 not in sides[2] and 32 not in sides[2]


@pytest.mark.usefixtures("backend")
def test_sets_of_layers_sorted_by_size_differ_by_less_than_the_largest_one(
    device: str, rng: np.random.Generator
) -> None:
    sizes = np.sort(rng.integers(1, 10**6, 64))
    drawn = [
        sample(device, np.full(64, 0.5), seed=4, step=step, rank=rank, world_size=4, run_length=2) @ sizes
        for step, rank in itertools.product(range(10), range(4))
    ]
    assert max(drawn) - min(drawn) < sizes.max()
    assert len(set(drawn)) == len(drawn)


@pytest.mark.usefixtures("backend")
@every_kind
def test_p_one_is_always_active_and_p_zero_never(device: str, strategy: str, draw: str) -> None:
    p = np.array([1.0, 0.0] * 8 + [0.3])
    for step, rank in itertools.product(range(50), range(3)):
        active = sample(device, p, seed=1, step=step, rank=rank, world_size=3, strategy=strategy, draw=draw)
        assert active[0:16:2].all()
        assert not active[1:16:2].any()


@pytest.mark.usefixtures("backend")
@every_kind
def test_a_draw_depends_on_seed_and_step_and_repeats_exactly(device: str, strategy: str, draw: str) -> None:
    def drawn(seed: int, step: int) -> bytes:
        p = np.full(64, 0.5)
        arguments = {"seed": seed, "step": step, "rank": 1, "world_size": 4, "strategy": strategy, "draw": draw}
        return sample(device, p, **arguments).tobytes()

    assert drawn(7, 9) == drawn(7, 9)
    others = [drawn(8, 9), drawn(7, 10), drawn(7 + 2**32, 9)]
    assert len({drawn(7, 9), *others}) == 4


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("draw", DRAWS)
def test_ranks_draw_alike_only_in_shared(device: str, draw: str) -> None:
    def num_different(strategy: str) -> int:
        p = np.linspace(0.1, 0.7, 64)
        common = {"seed": 3, "step": 4, "world_size": 4, "strategy": strategy, "draw": draw}
        return len({sample(device, p, rank=rank, **common).tobytes() for rank in range(4)})

    assert [num_different(strategy) for strategy in STRATEGIES] == [4, 4, 1]


@pytest.mark.usefixtures("backend")
def test_stratified_with_one_rank_is_a_plain_draw_of_everyones_stream(device: str) -> None:
    p = np.linspace(0.0, 1.0, 33)
    arguments = {"seed": 5, "step": 6, "draw": "systematic"}
    stratified = sample(device, p, strategy="stratified", **arguments)
    np.testing.assert_array_equal(stratified, sample(device, p, strategy="shared", **arguments))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("probabilities", {"probabilities": np.array([0.5, 1.0 + 1e-15])}),
        ("probabilities", {"probabilities": np.array([-1e-300, 0.5])}),
        ("probabilities", {"probabilities": np.array([math.nan, 0.5])}),
        ("probabilities", {"probabilities": np.array([[0.5], [0.5]])}),
        ("world_size", {"world_size": 0}),
        ("world_size", {"world_size": 2**24 + 1}),
        ("rank", {"rank": 4}),
        ("run_length", {"run_length": 0}),
        ("run_length", {"run_length": 2**32}),
        ("run_length: does not act with draw='bernoulli'; leave it out", {"run_length": 2, "draw": "bernoulli"}),
    ],
)
def test_the_backends_themselves_refuse_bad_arguments(backend: str, name: str, arguments: dict) -> None:
    valid = {"seed": 0, "step": 0, "rank": 0, "world_size": 4, "strategy": "stratified", "draw": "systematic"}
    call = {"probabilities": np.array([0.5, 0.5]), **valid, **arguments}
    with pytest.raises(ValueError, match=name):
        backends.load(backend).sample_layers(call.pop("probabilities"), **call)


@every_kind
@pytest.mark.parametrize("world_size", [1, 4, 8])
@pytest.mark.parametrize("p_min_times_world", [0.4, 1.2], ids=["p_min below 1/M", "p_min above 1/M"])
def test_marginals_are_p_and_mean_grad_is_unbiased(
    rng: np.random.Generator, strategy: str, draw: str, world_size: int, p_min_times_world: float
) -> None:
    """Within 4 standard errors, with the scales that the optimizers use. Fixed seeds: no chance involved."""
    num_steps = 100_000 // (1 if strategy == "shared" else world_size)  # as many draws
    p = probabilities_with(min(1.0, p_min_times_world / world_size))
    active = draw_many(p, num_steps, world_size, strategy, draw)
    standard_error = np.sqrt(p * (1 - p) / num_steps)
    assert (np.abs(active.mean(axis=0) - p) <= 4 * standard_error).all()
    if strategy != "shared":  # all 100,000 draws
        standard_error = np.sqrt(p * (1 - p) / (num_steps * world_size))
        assert (np.abs(active.mean(axis=(0, 1)) - p) <= 4 * standard_error + 1e-12).all()

    grads = 1.0 + rng.standard_normal((world_size, len(p)))  # one component of each rank's gradient
    estimates = (active * grads).sum(axis=1) * gradient_scales(strategy, p, active.sum(axis=1), world_size)
    standard_error = estimates.std(axis=0) / math.sqrt(num_steps)
    assert (np.abs(estimates.mean(axis=0) - grads.mean(axis=0)) <= 4 * standard_error + 1e-9).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("run_length", [1, 2, 4, 6])
def test_marginals_are_p_in_runs_too(strategy: str, run_length: int) -> None:
    num_steps = 20_000
    p = probabilities_with(0.13)
    marginals = draw_many(p, num_steps, 3, strategy, "systematic", run_length).mean(axis=0)
    assert (np.abs(marginals - p) <= 4 * np.sqrt(p * (1 - p) / num_steps)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("run_length", [None, 1, 2, 4])
def test_a_systematic_draw_takes_floor_or_ceil_of_the_budget(strategy: str, run_length: int | None) -> None:
    for p in (probabilities_with(0.13), np.full(9, 1 / 3), np.full(60, 0.5), np.full(7, 1e-3)):
        counts = draw_many(p, 2_000, 4, strategy, "systematic", run_length).sum(axis=2)
        assert is_floor_or_ceil(counts, p.sum())


@pytest.mark.parametrize(("draw", "run_length"), DRAWS_AND_RUNS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
def test_a_stratified_draw_gives_each_layer_floor_or_ceil_of_its_share_of_ranks(
    draw: str, run_length: int | None, world_size: int
) -> None:
    for p in (probabilities_with(0.13), np.full(9, 0.25), np.full(60, 0.5)):
        counts = draw_many(p, 1_000, world_size, "stratified", draw, run_length).sum(axis=1)
        assert is_floor_or_ceil(counts, world_size * p)


@pytest.mark.parametrize("draw", DRAWS)
def test_stratified_rank_subsets_are_uniform(draw: str) -> None:
    num_steps = 20_000
    active = draw_many(np.full(5, 0.5), num_steps, 4, "stratified", draw)
    for first, second in itertools.combinations(range(4), 2):
        together = (active[:, first] & active[:, second]).mean(axis=0)
        assert (np.abs(together - 1 / 6) <= 4 * math.sqrt(1 / 6 * 5 / 6 / num_steps)).all()


def test_bernoulli_layers_are_independent_of_each_other() -> None:
    num_steps = 20_000
    for strategy in STRATEGIES:
        active = draw_many(np.full(4, 0.3), num_steps, 2, strategy, "bernoulli")[:, 1]
        for first, second in itertools.combinations(range(4), 2):
            both = (active[:, first] & active[:, second]).mean()
            assert abs(both - 0.09) <= 4 * math.sqrt(0.09 * 0.91 / num_steps)
