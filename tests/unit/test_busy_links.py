"""Whether exchanges keep links busy: on modelled links, their time over that of the rank with most to carry."""

import importlib

import numpy as np
import pytest
import torch

from fair_links import fair_rates, on_links
from jointspar.step.exchange import Slices, ring, two_shot

module = importlib.import_module("jointspar.step.exchange.two_shot")
ELEMENTS = 64_000


def test_connections_share_what_their_ends_have():
    """By hand: both directions at once; two from one rank; three to one rank, of which one sends elsewhere too."""
    assert fair_rates([(0, 1), (1, 0)]) == {(0, 1): 1.0, (1, 0): 1.0}
    assert fair_rates([(0, 1), (0, 2), (1, 2)]) == {(0, 1): 0.5, (0, 2): 0.5, (1, 2): 0.5}
    third = 1 / 3
    expected = {(0, 3): third, (1, 3): third, (2, 3): third, (2, 0): 2 * third}
    assert fair_rates(list(expected)) == pytest.approx(expected)


def test_a_message_waits_for_its_receive_and_for_those_before_it():
    """By hand: rank 1 expects 3 bytes once it has sent 5; the message after them needs 2 more."""

    def run(transport):
        first, second = (torch.full((number,), transport.rank, dtype=torch.uint8) for number in (3, 2))
        if transport.rank == 0:
            sends = [transport.start_send(part, 1, what="") for part in (first, second)]
            transport.start_receive(torch.empty(5, dtype=torch.uint8), 1, what="").wait()
            [send.wait() for send in sends]
        else:
            transport.start_send(torch.ones(5, dtype=torch.uint8), 0, what="").wait()
            [receive.wait() for receive in [transport.start_receive(part, 0, what="") for part in (first, second)]]
            assert first.tolist() + second.tolist() == [0] * 5

    assert on_links(2, run).now == pytest.approx(10)


def patterns():
    rng = np.random.default_rng(0)
    pairs = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=bool)
    yield "stratified_4", np.array([36_000, 28_000]), pairs
    yield "stratified_3", np.array([20_000, 22_000, 22_000]), ~np.eye(3, dtype=bool)
    yield "quarter_4", np.array([14_000, 18_000, 15_000, 17_000]), np.eye(4, dtype=bool)
    yield "stratified_8", np.array([36_000, 28_000]), np.concatenate([pairs, pairs])
    for number in range(4):
        computed = rng.random((4, 10)) < 0.5
        computed[rng.integers(4), ~computed.any(axis=0)] = True
        yield f"independent_{number}", np.full(10, 6_400), computed


@pytest.mark.parametrize(("sizes", "computed"), [pattern[1:] for pattern in patterns()], ids=[p[0] for p in patterns()])
def test_two_shot_takes_little_longer_than_its_busiest_rank_must(monkeypatch, sizes, computed):
    monkeypatch.setattr(module, "_MIN_SEGMENT_BYTES", 4)
    slices = Slices(sizes, computed)
    expected = torch.tensor(np.repeat(computed.sum(axis=0), sizes), dtype=torch.float32)

    def run(transport):
        packed = torch.tensor(np.repeat(computed[transport.rank], sizes), dtype=torch.float32)
        two_shot(transport, packed, what="test", slices=slices)
        assert torch.equal(packed, expected)

    links = on_links(len(computed), run)
    most = max(*links.sent.values(), *links.received.values())
    assert links.now <= 1.05 * most


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_exchanges_of_what_all_computed_keep_links_busy(monkeypatch, world_size):
    monkeypatch.setattr(module, "_MIN_SEGMENT_BYTES", 4)
    for exchange in (ring, two_shot):
        links = on_links(world_size, lambda transport, e=exchange: e(transport, torch.ones(ELEMENTS), what="test"))
        ideal = 2 * (world_size - 1) / world_size * 4 * ELEMENTS
        assert links.now <= 1.02 * ideal
