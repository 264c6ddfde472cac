"""Allreduce and ring on 1, 2 and 3 ranks against a float64 sum that each rank computes from all ranks' inputs."""

import importlib

import numpy as np
import pytest
import torch

from jointspar.comm.hashing import stable_hash
from jointspar.step.exchange import choose
from support import launched

pytestmark = pytest.mark.mpi

LENGTHS = [0, 1, 2, 1000, 100003]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


def whole_numbers(rank, length):
    """Small enough that every partial sum is exact in every dtype."""
    return np.random.default_rng([length, rank]).integers(-8, 9, length).astype(np.float64)


def real_numbers(rank, length):
    return np.random.default_rng([length, rank]).standard_normal(length)


def exchanged(transport, exchange, numbers, length, dtype):
    packed = torch.tensor(numbers(transport.rank, length)).to(dtype)
    exchange(transport, packed, what="test")
    return packed


def assert_same_on_all_ranks(transport, packed):
    words = np.array([stable_hash(packed)], dtype=np.int64)
    rows = transport.start_headers(words, what="digest").wait()
    assert (rows == rows[0]).all()


def check_sums(transport, name, dtype):
    exchange = choose(name, transport, dtype)
    for length in LENGTHS:
        world = range(transport.world_size)
        packed = exchanged(transport, exchange, whole_numbers, length, dtype)
        assert (packed.double().numpy() == sum(whole_numbers(rank, length) for rank in world)).all()
        packed = exchanged(transport, exchange, real_numbers, length, dtype)
        expected = sum(torch.tensor(real_numbers(rank, length)).to(dtype).double().numpy() for rank in world)
        scale = sum(np.abs(real_numbers(rank, length)) for rank in world)
        assert (np.abs(packed.double().numpy() - expected) <= transport.world_size * EPSILON[dtype] * scale).all()
        assert_same_on_all_ranks(transport, packed)
        again = exchanged(transport, exchange, real_numbers, length, dtype)
        assert stable_hash(packed) == stable_hash(again)


def check_ring_bytes(transport):
    """Each rank sends every chunk but one in either half of the journey."""
    for length in (1, 7, 100003):
        bounds = [length * chunk // transport.world_size for chunk in range(transport.world_size + 1)]
        sizes = np.diff(bounds)
        rank, last = transport.rank, transport.world_size - 1
        steps = [(rank - step) % transport.world_size for step in range(2 * last)]
        before = transport.bytes_sent
        choose("ring", transport, torch.bfloat16)(transport, torch.ones(length, dtype=torch.bfloat16), what="bytes")
        assert transport.bytes_sent - before == 2 * sum(sizes[chunk] for chunk in steps)


def check_large(transport):
    """Many segments, more than any eager limit, all ranks sending at once."""
    packed = torch.full((3_000_001,), float(transport.rank + 1))
    choose("ring", transport, torch.float32)(transport, packed, what="large")
    assert (packed == sum(range(1, transport.world_size + 1))).all()


def check_every_segment_and_window_size(transport):
    """The smallest segments and fewest posted receives exercise every wait of the pipeline."""
    ring = importlib.import_module("jointspar.step.exchange.ring")
    before = ring._MIN_SEGMENT_BYTES, ring._NUM_POSTED
    for ring._MIN_SEGMENT_BYTES, ring._NUM_POSTED in ((4, 1), (64, 2), (4, 4)):
        for length in (1, 2, 3, 5, 64, 1001):
            exchange = choose("ring", transport, torch.float32)
            packed = exchanged(transport, exchange, whole_numbers, length, torch.float32)
            assert (packed.numpy() == sum(whole_numbers(rank, length) for rank in range(transport.world_size))).all()
    ring._MIN_SEGMENT_BYTES, ring._NUM_POSTED = before


def sum_everything():
    transport = launched(timeout=30)
    for dtype in FLOATS:
        check_sums(transport, "ring", dtype)
        check_sums(transport, "auto", dtype)
    for dtype in (torch.float32, torch.float64):
        check_sums(transport, "allreduce", dtype)
    check_every_segment_and_window_size(transport)
    check_ring_bytes(transport)
    check_large(transport)
    before = transport.bytes_sent
    choose("auto", transport, torch.float32)(transport, torch.ones(100), what="bytes")
    assert transport.bytes_sent - before == (400 if transport.world_size > 1 else 0)
    transport.close()
    print(f"sum_everything: rank {transport.rank} is done\n", end="", flush=True)


def test_exchanges_sum_over_ranks_with_the_same_bits_everywhere(checks):
    checks("sum_everything")


def interrupt_a_ring():
    """Rank 0 is interrupted between two waits of a ring; the transport must not be used after that."""
    transport = launched(timeout=5, on_failure="raise")
    ring = importlib.import_module("jointspar.step.exchange.ring")

    def interrupted(out, packed):
        raise KeyboardInterrupt

    ring.ops.add_packed = interrupted
    with pytest.raises(KeyboardInterrupt):
        ring.ring(transport, torch.ones(1000), what="step 3 exchange")
    with pytest.raises(RuntimeError, match="step 3 exchange was left by KeyboardInterrupt"):
        ring.ring(transport, torch.ones(1000), what="step 4 exchange")
    print("refused", flush=True)


def test_interrupted_ring_poisons_the_transport_and_the_job_still_ends(run_ranks):
    job = run_ranks(2, interrupt_a_ring, expect_code=None, timeout=30)
    assert "refused" in job.output
    assert "at exit, after a failure" in job.output
