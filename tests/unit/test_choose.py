"""Which exchange is taken: by name, by measured costs, and by what a state remembers."""

import warnings

import numpy as np
import pytest
import torch

from jointspar.comm import local
from jointspar.step.exchange import Chooser, Costs, Slices, candidates, choose
from jointspar.step.exchange.measure import measure
from jointspar.step.exchange.staged import Staged


class Ranks:
    """Two ranks that only headers pass between; the other one took `slower` times as long."""

    name = "mpi: some"
    world_size = 2
    is_simulated = False
    eager_bytes = None

    def __init__(self, can_sum=(torch.float32,), slower=1):
        self.can_sum, self.slower = can_sum, slower

    def can_allreduce(self, dtype):
        return dtype in self.can_sum

    def start_headers(self, words, *, what):
        return Rows(np.stack([words, self.slower * words]))


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def wait(self):
        return self.rows


class Clock:
    """Time passes only where an exchange says so."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr("jointspar.step.exchange.measure.time.perf_counter_ns", lambda: self.now)

    def exchange(self, latency, per_byte):
        """An exchange that takes `latency` + `per_byte` * bytes nanoseconds, and notes its buffers' bytes."""

        def run(transport, packed, *, what, slices=None):
            num_bytes = packed.numel() * packed.element_size()
            run.sizes.append(num_bytes)
            self.now += int(latency + per_byte * num_bytes)

        run.sizes = []
        return run


def everything(num_elements, world_size=2):
    return Slices(np.array([num_elements]), np.ones((world_size, 1), dtype=bool))


def test_a_name_stands_for_itself_and_auto_for_all_that_carry_the_dtype():
    assert list(candidates("ring", Ranks(), torch.float32)) == ["ring"]
    assert list(candidates("auto", Ranks(), torch.float32)) == ["allreduce", "ring", "two_shot"]
    assert list(candidates("auto", Ranks(), torch.bfloat16)) == ["ring", "two_shot"]
    assert list(candidates("auto", Ranks(), torch.float32, is_partial=False)) == ["allreduce", "ring"]
    assert list(candidates("auto", local(), torch.float32)) == ["ring"]


def test_auto_also_stands_for_short_messages_where_longer_ones_wait_for_an_answer():
    ranks = Ranks()
    ranks.eager_bytes = 1000
    short = ["ring_short", "two_shot_short"]
    assert list(candidates("auto", ranks, torch.float32)) == ["allreduce", "ring", "two_shot", *short]
    assert list(candidates("auto", ranks, torch.float32, is_partial=False)) == ["allreduce", "ring", "ring_short"]
    assert list(candidates("ring", ranks, torch.float32)) == ["ring"]


def test_an_exchange_that_cannot_sum_the_dtype_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match=r"mpi: some cannot sum torch\.bfloat16: use exchange='ring' or 'two_shot'"):
        candidates("allreduce", Ranks(), torch.bfloat16)
    with pytest.raises(ValueError, match="exchange: 'tree' is not one of auto, allreduce, ring, two_shot"):
        candidates("tree", Ranks(), torch.float32)


def test_costs_are_the_times_of_the_slowest_rank_at_growing_lengths(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"allreduce": clock.exchange(10_000, 0.02), "ring": clock.exchange(50_000, 0.01)}
    costs = measure(ways, Ranks(slower=3), torch.float32, 1 << 30)
    assert costs.num_bytes == (1 << 14, 1 << 18, 1 << 22, 1 << 25)
    assert costs.promise("allreduce", 1 << 20) == pytest.approx(3e-9 * (10_000 + 0.02 * (1 << 20)), rel=1e-4)
    assert costs.promise("ring", 1 << 26) == pytest.approx(2 * 3e-9 * (50_000 + 0.01 * (1 << 25)), rel=1e-4)
    assert costs.promise("ring", 0) == costs.promise("ring", 1 << 14)
    assert costs.cheapest(everything(800_000), 4) == "allreduce"  # 1.1 times its 74,000 ns
    assert costs.cheapest(everything(825_000), 4) == "ring"


def test_a_slow_link_is_measured_with_few_bytes(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"allreduce": clock.exchange(0, 2_000), "ring": clock.exchange(0, 1_000)}  # 1 MB/s
    measure(ways, Ranks(), torch.float32, 1 << 30)
    assert ways["ring"].sizes == [1 << 14] * 3 + [1 << 18]  # one round of the largest that fits into a second
    assert clock.now < 1e9
    ways = {"allreduce": clock.exchange(0, 80_000), "ring": clock.exchange(0, 100_000)}
    costs = measure(ways, Ranks(), torch.float32, 1 << 30)
    assert ways["ring"].sizes == [16384]
    assert costs.promise("ring", 1e6) == pytest.approx(100.0)
    assert costs.promise("allreduce", 1e6) == pytest.approx(80.0)


def test_short_buffers_are_measured_as_they_are(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"allreduce": clock.exchange(10_000, 2), "ring": clock.exchange(50_000, 1)}
    costs = measure(ways, Ranks(), torch.float32, 400)
    assert costs.num_bytes == (400,)
    assert costs.seconds["allreduce"] == pytest.approx((10.8e-6,))
    assert measure(ways, Ranks(), torch.float32, 0).num_bytes == (4,)


def test_two_shot_is_judged_by_what_it_sends():
    alone = Slices(np.array([500, 500]), np.eye(2, dtype=bool))
    assert alone.sent_by_two_shot() == 500
    for name in ("two_shot", "two_shot_short"):
        costs = Costs((0, 4000), {"ring": (0.0, 4000.0), name: (1000.0, 5000.0)})
        assert costs.cheapest(everything(1000), 4) == "ring"
        assert costs.cheapest(alone, 4) == name


def test_of_equal_promises_the_first_is_taken():
    assert Costs((40,), {"ring": (1.0,), "two_shot": (1.0,)}).cheapest(everything(10), 4) == "ring"


@pytest.mark.parametrize(
    ("unsteady", "steady"), [("allreduce", "ring"), ("ring", "ring_short"), ("two_shot", "two_shot_short")]
)
def test_a_librarys_allreduce_and_long_messages_must_promise_a_tenth_less(unsteady, steady):
    def chosen(seconds, num_elements):
        return Costs((1000,), {unsteady: (seconds,), steady: (1.0,)}).cheapest(everything(num_elements), 4)

    for num_elements in (10, 250, 1000):  # measured and beyond
        assert [chosen(0.89, num_elements), chosen(0.92, num_elements), chosen(1.0, num_elements)] == [
            unsteady, steady, steady,
        ]  # fmt: skip


def chooser(num_bytes, **seconds):
    made = Chooser("auto", Ranks(), torch.float32, is_partial=False)
    made.costs = Costs(num_bytes, seconds)
    return made


def test_a_state_is_taken_over_where_it_applies():
    saved = chooser((16, 256), allreduce=(1.0, 2.0), ring=(3.0, 4.0))
    other = chooser((16,), allreduce=(9.0,), ring=(9.0,))
    other.load_state_dict(saved.state_dict())
    assert other.costs == saved.costs
    state = saved.state_dict()
    without_allreduce = {name: value for name, value in state.items() if name != "allreduce"}
    for foreign in ({}, state | {"world_size": torch.tensor(3)}, without_allreduce):
        kept = chooser((16,), allreduce=(9.0,), ring=(9.0,))
        kept.load_state_dict(foreign)
        assert kept.costs == Costs((16,), {"allreduce": (9.0,), "ring": (9.0,)})


def test_a_named_exchange_is_neither_measured_nor_remembered():
    named = Chooser("ring", Ranks(), torch.float32, is_partial=True)
    named.prepare(1 << 20)
    assert named.costs is None and named.state_dict() == {}
    named.load_state_dict(chooser((16,), allreduce=(1.0,), ring=(3.0,)).state_dict())
    assert named.choose(everything(10)) == "ring"


def test_dense_bytes_are_what_each_exchange_would_send():
    both = Chooser("auto", Ranks(), torch.float32, is_partial=True)
    assert [both.sent_bytes(name, 1000) for name in choose.NAMES[1:]] == [1000, 1000, 1000]
    alone = Chooser("auto", local(), torch.float32, is_partial=True)
    assert [alone.sent_bytes(name, 1000) for name in choose.NAMES[1:]] == [0, 0, 0]


@pytest.mark.parametrize(("takes_cuda", "is_right"), [(False, True), (True, True), (True, False)])
def test_on_a_cuda_device_only_what_the_transport_takes_goes_there_unstaged(takes_cuda, is_right, monkeypatch):
    ranks = Ranks()
    ranks.rank = 0
    monkeypatch.setattr(ranks, "agree_on_cuda", lambda: takes_cuda, raising=False)
    monkeypatch.setattr(choose, "adds_up", lambda *_: is_right)
    staged = {}
    for name in ("allreduce", "ring", "two_shot"):
        made = Chooser(name, ranks, torch.float32, is_partial=True, device=torch.device("cuda", 0))
        with warnings.catch_warnings(record=True) as caught:
            made.prepare(1 << 20)
        assert len(caught) == (name == "allreduce" and takes_cuda and not is_right)
        staged[name] = isinstance(made._candidates[name], Staged)
    assert staged == {"allreduce": not (takes_cuda and is_right), "ring": True, "two_shot": True}


class Doubling:
    """An exchange of a user's own, without state."""

    name, is_rank_local = "doubling", False

    def __call__(self, transport, packed, *, what, slices=None):
        packed.mul_(2.0)

    def agreed(self):
        return "doubling"

    def state_dict(self):
        return {}

    def check_state(self, state):
        if state:
            raise ValueError("state_dict: of something else")

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("transport", [local(), Ranks()])
def test_an_exchange_of_the_users_own_is_always_called(transport):
    made = Chooser(Doubling(), transport, torch.float32, is_partial=True)
    made.prepare(1 << 20)
    packed = torch.ones(10)
    made.exchange(made.choose(everything(10)), packed, what="test", slices=everything(10))
    assert packed.tolist() == [2.0] * 10
    assert (made.costs, made.agreed(), made.state_dict()) == (None, "doubling", {})
    with pytest.raises(ValueError, match="of something else"):
        made.check_state({"costs": torch.zeros(1)})
    on_device = Chooser(Doubling(), transport, torch.float32, is_partial=True, device=torch.device("cuda", 0))
    on_device.prepare(1 << 20)
    assert isinstance(on_device._candidates["doubling"], Staged)
