"""The sum of what was computed, among threads; its order of addition, its bytes, and who owns what."""

import importlib
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from jointspar.comm import local
from jointspar.comm.simulated import run_simulated
from jointspar.step.exchange import Slices, two_shot
from jointspar.step.exchange.scratch import Scratch
from jointspar.step.exchange.segments import _eighth_power, partition
from late_transport import on_threads

module = importlib.import_module("jointspar.step.exchange.two_shot")


def random_slices(rng, world_size, total):
    """Slices of uneven sizes, some empty, in an order that has nothing to do with who computed them."""
    cuts = np.sort(rng.integers(0, total + 1, 12))
    sizes = np.diff(np.concatenate([[0], cuts, [total]]))
    computed = rng.random((world_size, sizes.size)) < 0.5
    computed[rng.integers(world_size, size=sizes.size), np.arange(sizes.size)] = True
    return Slices(sizes, computed)


def contributions(slices, values):
    """`values` [world_size, total] where a rank computed them, NaN elsewhere, since that must not be read."""
    where = np.repeat(slices.computed, slices.sizes, axis=1)
    return [
        torch.tensor(np.where(mask, row, np.nan), dtype=torch.float32) for mask, row in zip(where, values, strict=True)
    ]


def exchange(slices, buffers, **named):
    return on_threads(
        len(buffers),
        lambda transport: two_shot(transport, buffers[transport.rank], what="test", slices=slices),
        **named,
    )


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize(
    ("total", "min_bytes", "ahead"),
    [(1, 4, 1), (7, 4, 8), (1000, 4, 1), (1000, 4, 8), (1000, 4096, 8), (300_000, 131072, 1)],
)
def test_contributions_are_added_in_the_order_of_ranks(rng, monkeypatch, world_size, total, min_bytes, ahead, is_late):
    monkeypatch.setattr(module, "_MIN_SEGMENT_BYTES", min_bytes)
    monkeypatch.setattr(module, "_NUM_AHEAD", ahead)
    slices = random_slices(rng, world_size, total)
    values = rng.standard_normal((world_size, total)).astype(np.float32)
    expected = np.full(total, np.nan, dtype=np.float32)
    for row, mask in zip(values, np.repeat(slices.computed, slices.sizes, axis=1), strict=True):
        expected = np.where(mask, np.where(np.isnan(expected), row, expected + row), expected)
    buffers = contributions(slices, values)
    exchange(slices, buffers, is_late=is_late)
    assert all((buffer.numpy() == expected).all() for buffer in buffers)


@pytest.mark.parametrize("world_size", [2, 4])
def test_without_slices_all_ranks_computed_all_of_it(world_size):
    buffers = [torch.arange(999.0) * (rank + 1) for rank in range(world_size)]
    transports = exchange(None, buffers)
    assert all(torch.equal(buffer, torch.arange(999.0) * sum(range(1, world_size + 1))) for buffer in buffers)
    assert sum(transport.bytes_sent for transport in transports) == 2 * (world_size - 1) * 4 * 999


def test_each_slice_is_sent_as_often_as_it_must():
    slices = Slices(np.array([100, 100, 40]), np.array([[1, 0, 1], [0, 1, 1]], dtype=bool))
    transports = exchange(slices, contributions(slices, np.ones((2, 240))))
    assert [transport.bytes_sent for transport in transports] == [4 * 140, 4 * 140]
    assert slices.sent_by_two_shot() * 2 == 280  # a ring sends 2 * 240


def test_one_ranks_work_reaches_all_others_through_all_of_them():
    """Handing on is shared: nobody sends more than a ring would have."""
    slices = Slices(np.array([400_000]), np.array([[1], [0], [0], [0]], dtype=bool))
    buffers = contributions(slices, np.ones((4, 400_000)))
    transports = exchange(slices, buffers)
    assert all((buffer == 1).all() for buffer in buffers)
    sent = [transport.bytes_sent // 4 for transport in transports]
    assert sum(sent) == 3 * 400_000
    assert max(sent) <= 1.5 * 400_000


@pytest.mark.parametrize(
    ("computed", "most"),
    [
        ([[1, 0], [0, 1], [1, 0], [0, 1]], 1.07),
        ([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], 1.07),
        ([[1], [1], *[[0]] * 6], 1.2),  # two of eight ranks: adding it all up, each would send 4
    ],
    ids=["pairs", "neighbours", "two"],
)
def test_the_busiest_rank_has_little_more_to_carry_than_the_others(computed, most):
    """In sizes of the buffer. The mean is 1 at least: k + M - 2 times what k of M ranks computed, over M."""
    computed = np.array(computed, dtype=bool)
    world_size, num_slices = computed.shape
    slices = Slices(np.full(num_slices, 64_000), computed)
    sent, received = np.zeros((2, world_size))
    for segment in partition(slices, 64_000 * num_slices // (16 * world_size)):
        for source in set(segment.contributors) - {segment.owner}:
            sent[source] += segment.end - segment.start
            received[segment.owner] += segment.end - segment.start
        for target in range(world_size):
            if segment.sum_goes_to(target):
                sent[segment.owner] += segment.end - segment.start
                received[target] += segment.end - segment.start
    total = slices.sizes.sum()
    assert max(sent.max(), received.max()) / total <= most


def test_owners_are_found_by_operations_that_every_processor_rounds_alike(rng):
    """Three multiplications, as NumPy rounds them; not the eighth power rounded once, which `**` may come to."""
    loads = rng.random(2000) * 4
    powers = [_eighth_power(load) for load in loads.tolist()]
    assert powers == np.square(np.square(np.square(loads))).tolist()
    assert powers != [float(Fraction(load) ** 8) for load in loads.tolist()]  # it would be seen


def test_two_ranks_share_the_additions_and_keep_what_they_alone_computed():
    computed = np.array([[1, 1, 0], [0, 1, 1]], dtype=bool)
    segments = partition(Slices(np.array([640, 640, 640]), computed), 10)
    for contributors in ((0,), (1,)):
        assert {segment.owner for segment in segments if segment.contributors == contributors} == set(contributors)
    added = [segment.owner for segment in segments if len(segment.contributors) == 2]
    assert added.count(0) == added.count(1) == 32


def noting(transport):
    """The (operation, rank, tag) that `transport` is asked for from now on, and ("wait", rank, tag) of receives."""
    events, start_send, start_receive = [], transport.start_send, transport.start_receive

    def sending(buffer, rank, *, what, tag):
        events.append(("send", rank, tag))
        return start_send(buffer, rank, what=what, tag=tag)

    def receiving(buffer, rank, *, what, tag):
        events.append(("receive", rank, tag))
        pending = start_receive(buffer, rank, what=what, tag=tag)
        wait = pending.wait
        pending.wait = lambda: (events.append(("wait", rank, tag)), wait())
        return pending

    transport.start_send, transport.start_receive = sending, receiving
    return events


def test_sums_of_what_a_rank_did_not_compute_are_expected_before_it_waits():
    slices = Slices(np.full(3, 64_000), ~np.eye(3, dtype=bool))
    segments = partition(slices, module._MIN_SEGMENT_BYTES // 4)
    expected = [0, 0, 0]

    def run(transport):
        events = noting(transport)
        two_shot(transport, torch.ones(192_000), what="test", slices=slices)
        before = events[: [name for name, *_ in events].index("wait")]
        expected[transport.rank] = [tag for name, _, tag in before if name == "receive"].count(module._SUM)

    on_threads(3, run)
    for rank in range(3):
        alien = [segment for segment in segments if rank not in segment.contributors and segment.owner != rank]
        assert expected[rank] == len(alien) > 0


def test_what_a_rank_has_from_the_start_is_under_way_before_it_expects_anything():
    """Contributions before sums, as others wait for those to add them up."""
    slices = Slices(np.full(3, 64_000), np.array([[1, 0, 1], [0, 1, 1]], dtype=bool))
    segments = partition(slices, module._MIN_SEGMENT_BYTES // 4)
    sent = [[], []]

    def run(transport):
        events = noting(transport)
        two_shot(transport, torch.ones(192_000), what="test", slices=slices)
        sent[transport.rank] = [tag for _, _, tag in events[: [name for name, *_ in events].index("receive")]]

    on_threads(2, run)
    for rank in range(2):
        contributed = [segment for segment in segments if rank in segment.contributors and rank != segment.owner]
        alone = [segment for segment in segments if segment.contributors == (rank,) and rank == segment.owner]
        assert sent[rank] == [module._CONTRIBUTION] * len(contributed) + [module._SUM] * len(alone)
        assert contributed and alone


def test_sums_of_what_a_rank_computed_are_expected_as_its_contributions_have_left():
    """They have at once here. Without that their owners would keep them until this rank has added up all of its own."""
    events = run_simulated(3, lambda transport: (noting(transport), two_shot(transport, torch.ones(600_000), what="")))
    for own, _ in events:
        last_contribution = max(
            place for place, event in enumerate(own) if event == ("wait", event[1], module._CONTRIBUTION)
        )
        expected = [place for place, (name, _, tag) in enumerate(own) if (name, tag) == ("receive", module._SUM_BACK)]
        assert len(expected) > 0 and max(expected) < last_contribution


def test_segments_hold_every_element_once_with_its_contributors(rng):
    for world_size in (2, 3, 8):
        slices = random_slices(rng, world_size, 5000)
        segments = sorted(partition(slices, 128), key=lambda segment: segment.start)
        assert [segment.start for segment in segments] == [0, *(segment.end for segment in segments[:-1])]
        assert segments[-1].end == 5000
        masks = np.repeat(slices.computed, slices.sizes, axis=1)
        for segment in segments:
            assert 0 < segment.end - segment.start <= 128
            assert (masks[:, segment.start : segment.end].sum(axis=1) > 0).nonzero()[0].tolist() == list(
                segment.contributors
            )
            assert (masks[list(segment.contributors), segment.start : segment.end]).all()


def test_what_is_ready_comes_first_and_what_its_owner_did_not_compute_last():
    computed = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=bool)
    segments = partition(Slices(np.array([40_000, 28_000, 3000, 3000]), computed), 1000)
    places = [(s.contributors != (s.owner,), s.owner not in s.contributors, s.start) for s in segments]
    assert places == sorted(places)
    assert {place[:2] for place in places} == {(False, False), (True, False), (True, True)}


def test_scratch_memory_is_for_what_comes_in_and_bounded(monkeypatch):
    monkeypatch.setattr(module, "_NUM_AHEAD", 2)
    taken = []

    class Noting(Scratch):
        def slots(self, num_slots, num_elements, dtype):
            taken.append(num_slots)
            return super().slots(num_slots, num_elements, dtype)

    def run(slices):
        buffers = contributions(slices, np.ones((2, 64_000)))
        on_threads(
            2,
            lambda transport: two_shot(
                transport, buffers[transport.rank], what="", slices=slices, scratch=Noting(), segment_bytes=4000
            ),
        )
        assert all((buffer == slices.computed.sum()).all() for buffer in buffers)

    run(Slices(np.array([64_000]), np.array([[1], [0]], dtype=bool)))
    run(Slices(np.array([64_000]), np.array([[1], [1]], dtype=bool)))
    assert taken == [0, 0, 2, 2]


def test_ownership_is_even_where_all_ranks_computed_all_of_it():
    segments = partition(Slices(np.array([6400]), np.ones((4, 1), dtype=bool)), 100)
    owned = [sum(s.end - s.start for s in segments if s.owner == rank) for rank in range(4)]
    assert owned == [1600] * 4


def test_what_nobody_computed_is_left_alone():
    slices = Slices(np.array([3, 2]), np.array([[1, 0], [1, 0]], dtype=bool))
    buffers = [torch.full((5,), 7.0) for _ in range(2)]
    exchange(slices, buffers)
    assert all(buffer.tolist() == [14.0] * 3 + [7.0] * 2 for buffer in buffers)


def test_two_segments_meet_without_gap():
    """Neighbouring slices of the same ranks are one run, cut evenly."""
    computed = np.array([[1, 1, 0], [0, 0, 1]], dtype=bool)
    segments = partition(Slices(np.array([50, 60, 10]), computed), 100)
    assert [(segment.start, segment.end) for segment in segments] == [(0, 55), (55, 110), (110, 120)]
    assert all(first.end == second.start for first, second in pairwise(segments))


def test_slices_of_another_buffer_are_refused():
    with pytest.raises(ValueError, match="slices are not of 5 elements and 1 ranks"):
        two_shot(local(), torch.ones(5), what="test", slices=Slices(np.array([4]), np.ones((1, 1), dtype=bool)))
    with pytest.raises(ValueError, match="slices are not of 5 elements and 1 ranks"):
        two_shot(local(), torch.ones(5), what="test", slices=Slices(np.array([5]), np.ones((2, 1), dtype=bool)))
