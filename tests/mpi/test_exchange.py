"""Every exchange on 1, 2 and 3 ranks against a float64 sum that each rank computes from all ranks' inputs."""

import importlib

import numpy as np
import pytest
import torch

from jointspar.comm.hashing import stable_hash
from jointspar.step.exchange import Chooser, Slices, candidates, ring, two_shot
from jointspar.step.exchange.measure import adds_up
from support import launched

pytestmark = pytest.mark.mpi

LENGTHS = [0, 1, 2, 1000, 100003]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def whole_numbers(rank, length):
    """Small enough that every partial sum is exact in every dtype."""
    return np.random.default_rng([length, rank]).integers(-8, 9, length).astype(np.float64)


def real_numbers(rank, length):
    return np.random.default_rng([length, rank]).standard_normal(length)


def slices_of(transport, length):
    """Uneven slices, each computed by every second rank or so, at least by one."""
    rng = np.random.default_rng(length)
    sizes = np.diff(np.concatenate([[0], np.sort(rng.integers(0, length + 1, 10)), [length]]))
    computed = rng.random((transport.world_size, sizes.size)) < 0.5
    computed[rng.integers(transport.world_size, size=sizes.size), np.arange(sizes.size)] = True
    return Slices(sizes, computed)


def inputs(transport, numbers, length, slices):
    """Every rank's numbers, float64 [world_size, length], zero where it computed nothing."""
    rows = np.stack([numbers(rank, length) for rank in range(transport.world_size)])
    return rows if slices is None else rows * np.repeat(slices.computed, slices.sizes, axis=1)


def exchanged(transport, exchange, numbers, length, dtype, slices=None):
    packed = torch.tensor(inputs(transport, numbers, length, slices)[transport.rank]).to(dtype)
    exchange(transport, packed, what="test", slices=slices)
    return packed


def assert_same_on_all_ranks(transport, packed):
    words = np.array([stable_hash(packed)], dtype=np.int64)
    rows = transport.start_headers(words, what="digest").wait()
    assert (rows == rows[0]).all()


def check_sums(transport, exchange, dtype, slices_of=lambda transport, length: None):
    """Exact sums of whole numbers; others within what rounding each addition allows; the same bits, again too."""
    for length in LENGTHS:
        slices = slices_of(transport, length)
        packed = exchanged(transport, exchange, whole_numbers, length, dtype, slices)
        assert (packed.double().numpy() == inputs(transport, whole_numbers, length, slices).sum(axis=0)).all()
        packed = exchanged(transport, exchange, real_numbers, length, dtype, slices)
        rounded = (
            torch.tensor(inputs(transport, real_numbers, length, slices))
            .to(dtype)
            .double()
            .numpy()
            .astype(np.longdouble)
        )
        error = np.abs(packed.double().numpy() - rounded.sum(axis=0))
        roundings = (transport.world_size - 1) * torch.finfo(dtype).eps / 2
        assert (error <= roundings / (1 - roundings) * np.abs(rounded).sum(axis=0)).all()
        assert_same_on_all_ranks(transport, packed)
        again = exchanged(transport, exchange, real_numbers, length, dtype, slices)
        assert stable_hash(packed) == stable_hash(again)


def check_ring_bytes(transport):
    """Each rank sends every chunk but one in either half of the journey."""
    for length in (1, 7, 100003):
        bounds = [length * chunk // transport.world_size for chunk in range(transport.world_size + 1)]
        sizes = np.diff(bounds)
        rank, last = transport.rank, transport.world_size - 1
        steps = [(rank - step) % transport.world_size for step in range(2 * last)]
        before = transport.bytes_sent
        ring(transport, torch.ones(length, dtype=torch.bfloat16), what="bytes")
        assert transport.bytes_sent - before == 2 * sum(sizes[chunk] for chunk in steps)


def check_two_shot_bytes(transport):
    """All ranks together send each slice k + M - 2 times, where k computed it; the ring sends it 2 M - 2 times."""
    for length in (1, 7, 100003, 1_000_003):
        slices = slices_of(transport, length)
        before = transport.bytes_sent
        two_shot(transport, torch.zeros(length), what="bytes", slices=slices)
        sent = transport.bytes_sent - before
        everybody = transport.start_headers(np.array([sent]), what="bytes").wait().sum()
        world_size = transport.world_size
        expected = 4 * int((slices.sizes * (slices.computed.sum(axis=0) + world_size - 2)).sum())
        # an owner that computed nothing of a slice costs it once more
        assert expected <= everybody <= expected + 4 * (length if world_size > 2 else 0) * (world_size > 1)


def check_large(transport):
    """Many segments, more than any eager limit, all ranks sending at once."""
    for exchange in (ring, two_shot):
        packed = torch.full((3_000_001,), float(transport.rank + 1))
        exchange(transport, packed, what="large")
        assert (packed == sum(range(1, transport.world_size + 1))).all()


def check_every_segment_and_window_size(transport):
    """The smallest segments and fewest posted receives exercise every wait of the pipelines."""
    for name, window in (("ring", "_NUM_POSTED"), ("two_shot", "_NUM_AHEAD")):
        module = importlib.import_module(f"jointspar.step.exchange.{name}")
        before = {
            constant: getattr(module, constant)
            for constant in ("_MIN_SEGMENT_BYTES", window, "_AHEAD_BYTES")
            if hasattr(module, constant)
        }
        for module._MIN_SEGMENT_BYTES, size in ((4, 1), (64, 2), (4, 4)):
            setattr(module, window, size)
            module._AHEAD_BYTES = 0
            for length in (1, 2, 3, 5, 64, 1001):
                exchange = candidates(name, transport, torch.float32)[name]
                slices = slices_of(transport, length) if name == "two_shot" else None
                packed = exchanged(transport, exchange, whole_numbers, length, torch.float32, slices)
                assert (packed.numpy() == inputs(transport, whole_numbers, length, slices).sum(axis=0)).all()
        for constant, value in before.items():
            setattr(module, constant, value)


def check_the_measured_choice(transport):
    """All ranks hold the same costs, of everything that carries the dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        chooser = Chooser("auto", transport, dtype, is_partial=True)
        chooser.prepare(40_000_000)
        words = np.array([stable_hash(chooser.costs)], dtype=np.int64)
        rows = transport.start_headers(words, what="digest").wait()
        assert (rows == rows[0]).all()
        if transport.world_size == 1:
            assert chooser.costs is None
        else:
            assert chooser.costs.seconds.keys() == candidates("auto", transport, dtype).keys()
            assert chooser.costs.num_bytes[0] == 16384


def check_trial_sums(transport):
    """A sum that is wrong on one rank is wrong on all of them."""

    def wrong_on_the_last(transport, packed, *, what, slices=None):
        transport.allreduce(packed, what=what)
        packed[-1] += transport.rank == transport.world_size - 1

    def last_instead_of_first(transport, packed, *, what, slices=None):
        if transport.rank == 0:
            packed.copy_((packed + transport.world_size - 1).remainder(8))
        transport.allreduce(packed, what=what)

    for dtype in FLOATS:
        for exchange in candidates("auto", transport, dtype).values():
            assert adds_up(exchange, transport, dtype, 100_000, torch.device("cpu"))
    assert not adds_up(wrong_on_the_last, transport, torch.float32, 100_000, torch.device("cpu"))
    if transport.world_size > 2:
        assert not adds_up(last_instead_of_first, transport, torch.float32, 4, torch.device("cpu"))


def sum_everything():
    transport = launched(timeout=30)
    check_trial_sums(transport)
    for dtype in FLOATS:
        for exchange in candidates("auto", transport, dtype).values():  # all that carry the dtype
            check_sums(transport, exchange, dtype)
        check_sums(transport, candidates("two_shot", transport, dtype)["two_shot"], dtype, slices_of)
    check_every_segment_and_window_size(transport)
    check_ring_bytes(transport)
    check_two_shot_bytes(transport)
    check_large(transport)
    check_the_measured_choice(transport)
    transport.close()
    print(f"sum_everything: rank {transport.rank} is done\n", end="", flush=True)


def test_exchanges_sum_over_ranks_with_the_same_bits_everywhere(checks):
    checks("sum_everything")


def interrupt_the_exchanges():
    """Each rank is interrupted between two waits; the transport must not be used after that."""
    for name in ("ring", "two_shot"):
        transport = launched(timeout=5, on_failure="raise")
        module = importlib.import_module(f"jointspar.step.exchange.{name}")

        def interrupted(out, packed):
            raise KeyboardInterrupt

        module.ops.add_packed = interrupted
        module._MIN_SEGMENT_BYTES = 4  # so that each rank has something to add, in messages that need no answer
        exchange = candidates(name, transport, torch.float32)[name]
        with pytest.raises(KeyboardInterrupt):
            exchange(transport, torch.ones(1000), what="step 3 exchange")
        with pytest.raises(RuntimeError, match="step 3 exchange was left by KeyboardInterrupt"):
            exchange(transport, torch.ones(1000), what="step 4 exchange")
    print("refused", flush=True)


def test_an_interrupted_exchange_poisons_the_transport_and_the_job_still_ends(run_ranks):
    job = run_ranks(2, interrupt_the_exchanges, expect_code=None, timeout=30)
    assert "refused" in job.output
    assert "at exit, after a failure" in job.output
