"""The agreement before payloads, among ranks that are threads of this process."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointspar.comm import local
from jointspar.comm.hashing import stable_hash
from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op, leave
from jointspar.errors import DesyncError, JointSparError


class Board:
    """Where threads that stand for ranks meet; the n-th header of one meets the n-th of the others."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.headers = [[] for _ in range(world_size)]
        self.changed = threading.Condition()

    def meet(self, number):
        with self.changed:
            met = self.changed.wait_for(lambda: all(len(own) > number for own in self.headers), timeout=5)
            assert met, "a rank waits for a header that another never sent"
            rows = [own[number] for own in self.headers]
        assert len({row.size for row in rows}) == 1, "headers of different sizes met"
        return np.stack(rows)


class ThreadTransport:
    """The part of a transport that an agreement uses."""

    is_simulated = False
    is_closed = True  # nothing to finish when the tests' own process exits
    borrower_met = None  # the error of a thread that the transport is lent to

    def __init__(self, board, rank):
        self.board, self.rank, self.world_size = board, rank, board.world_size

    def start_headers(self, words, *, what):
        with self.board.changed:
            own = self.board.headers[self.rank]
            own.append(words.copy())
            self.board.changed.notify_all()
            number = len(own) - 1
        return PendingMeeting(self, number)

    def take_back(self):
        if self.borrower_met is not None:
            error, self.borrower_met = self.borrower_met, None
            raise error


@dataclass
class PendingMeeting:
    transport: ThreadTransport
    number: int

    def wait(self):
        self.transport.take_back()
        return self.transport.board.meet(self.number)


def run_threads(world_size, program: Callable):
    """What program(transport) returned or raised, on each rank."""
    board, outcomes = Board(world_size), [None] * world_size

    def run(rank):
        try:
            outcomes[rank] = program(ThreadTransport(board, rank))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def agreement(transport, *, num_layers=3, num_values=2, **changes):
    arguments = {
        "layer_names": [f"layer{k}" for k in range(num_layers)],
        "layer_hashes": [stable_hash(["layer", k]) for k in range(num_layers)],
        "settings": {"seed": 0, "budget": 0.5},
        "num_values": num_values,
    }
    return Agreement(transport, **(arguments | changes))


def failures(world_size, program):
    """The messages of the DesyncErrors, one from each rank; anything else on a rank is a failure of the test."""
    outcomes = run_threads(world_size, program)
    assert all(isinstance(outcome, DesyncError) for outcome in outcomes), outcomes
    for rank, outcome in enumerate(outcomes):
        assert str(outcome).startswith(f"rank {rank}: ")
    return [str(outcome) for outcome in outcomes]


def only_on(rank, transport, there, elsewhere):
    return there if transport.rank == rank else elsewhere


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("num_layers", [0, 1, 63, 64, 65, 200])
def test_plans_bring_every_rank_the_active_layers_of_all(world_size, num_layers):
    active = np.random.default_rng(0).random((world_size, num_layers)) < 0.5

    def program(transport):
        agreed = agreement(transport, num_layers=num_layers)
        agreed.post_plan(7, active[transport.rank], shared=99)
        plan = agreed.wait_plan()
        assert plan.dtype == bool
        return plan

    transports = run_threads(world_size, program) if world_size > 1 else [program(local())]
    assert all((plan == active).all() for plan in transports)


@pytest.mark.parametrize("world_size", [1, 3])
def test_values_ride_along_unchanged_and_uncompared(world_size):
    values = np.array([[0.1, -0.0], [np.inf, np.nan], [5e-324, -1e300]])[:world_size]

    def program(transport):
        agreed = agreement(transport)
        gathered = agreed.go(Op.EXCHANGE, step=1, count=10, dtype=torch.float32, values=values[transport.rank])
        nothing = agreed.go(Op.AVERAGE, step=1)
        assert (nothing == 0).all()
        assert nothing.shape == (world_size, 2)
        agreed.finish()
        agreed.finish()
        return gathered

    outcomes = run_threads(world_size, program) if world_size > 1 else [program(local())]
    assert all(gathered.tobytes() == values.tobytes() for gathered in outcomes)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_differing_setting_is_named_with_its_ranks(rank):
    def program(transport):
        agreement(transport, settings={"budget": 0.5, "seed": only_on(rank, transport, 7, 3)})

    messages = failures(3, program)
    others = "ranks 1, 2" if rank == 0 else f"rank {rank}"
    for reader, message in enumerate(messages):
        assert f"setting 'seed' differs: {others} against rank 0 (here {7 if reader == rank else 3})" in message
        assert "budget" not in message


def test_a_setting_that_one_rank_lacks_is_reported_on_both_sides():
    def program(transport):
        agreement(transport, settings=only_on(1, transport, {"seed": 0}, {"seed": 0, "lag": 1}))

    messages = failures(2, program)
    assert "setting 'lag' differs: rank 1 against rank 0 (here 1)" in messages[0]
    assert "a setting that is missing here differs" in messages[1]


def test_differing_layers_are_named_first_ones_first():
    def program(transport):
        hashes = [1, 2, 3, 4, 5, 6] if transport.rank == 0 else [1, 9, 3, 9, 9, 9]
        agreement(transport, num_layers=6, layer_hashes=hashes)

    for message in failures(2, program):
        assert "layer 1 'layer1' differs: rank 1 against rank 0; layer 3 'layer3' differs" in message
        assert "'layer0'" not in message
        assert "layer 5" not in message


def test_differing_numbers_of_layers_are_reported_with_the_layer_that_is_too_many():
    messages = failures(2, lambda transport: agreement(transport, num_layers=2 + transport.rank * 200))
    assert "the numbers of layers differ: rank 0: 2, rank 1: 202" in messages[0]
    assert "layer 2 (not present here) differs" in messages[0]
    assert "layer 2 'layer2' differs" in messages[1]


def test_differing_always_active_parameters_or_value_counts_are_reported():
    for message in failures(2, lambda transport: agreement(transport, always_active_hash=transport.rank)):
        assert "the always-active parameters differ: rank 1 against rank 0" in message
    for message in failures(2, lambda transport: agreement(transport, num_values=1 + transport.rank)):
        assert "num_values differs: rank 1 against rank 0" in message


def test_a_plan_of_another_step_or_other_probabilities_is_refused_on_all_ranks():
    def other_step(transport):
        agreed = agreement(transport)
        agreed.post_plan(4 + transport.rank, np.zeros(3, dtype=bool))
        agreed.wait_plan()

    def other_probabilities(transport):
        agreed = agreement(transport)
        agreed.post_plan(4, np.zeros(3, dtype=bool), shared=1 + transport.rank // 2)
        agreed.wait_plan()

    assert all("rank 0: step 4 plan; rank 1: step 5 plan" in message for message in failures(2, other_step))
    expected = "step 4 plan: the shared probabilities or draws differ: ranks 2, 3 against rank 0"
    assert all(expected in message for message in failures(4, other_probabilities))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"count": 11}, "step 5 exchange: the numbers of elements differ: rank 1 against rank 0"),
        ({"dtype": torch.bfloat16}, "step 5 exchange: the dtypes differ"),
        (
            {"agreed": 1},
            "step 5 exchange: the chosen exchange, learning rates, other hyperparameters, or which parameters are",
        ),
        ({"step": 6}, "rank 0: step 5 exchange; rank 1: step 6 exchange"),
        ({"op": Op.SAVE}, "rank 0: step 5 exchange; rank 1: save at step 5"),
    ],
)
def test_a_go_that_differs_is_refused_on_all_ranks(changed, text):
    def program(transport):
        arguments = {"op": Op.EXCHANGE, "step": 5, "count": 10, "dtype": torch.float32, "agreed": 0}
        agreement(transport).go(**(arguments | only_on(1, transport, changed, {})))

    assert all(text in message for message in failures(2, program))


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Op.AVERAGE, "average at step 5: number, shapes, dtypes or layouts of the model's buffers differ"),
        (Op.LOAD, "load at step 5: the checkpoints that were found, or the states that were loaded, differ"),
        (Op.UPDATE, "the chosen exchange, learning rates, other hyperparameters"),
    ],
)
def test_what_differs_is_told_by_what_was_to_be_done(op, text):
    def program(transport):
        agreement(transport).go(op, step=5, agreed=transport.rank)

    assert all(text in message for message in failures(2, program))


@pytest.mark.parametrize("early", ["finish", "save"])
def test_a_rank_that_leaves_the_loop_meets_one_that_waits_for_the_next_plan(early):
    def program(transport):
        agreed = agreement(transport)
        for step in range(10):
            agreed.post_plan(step, np.ones(3, dtype=bool))
            if transport.rank == 1 and step == 4:
                return agreed.finish() if early == "finish" else agreed.go(Op.SAVE, step=step)
            agreed.wait_plan()
            agreed.go(Op.EXCHANGE, step=step, count=1)
        return None

    text = f"rank 0: step 4 exchange; rank 1: {early} at step 4"
    assert all(text in message for message in failures(2, program))


def test_a_plan_that_meets_a_go_is_refused_on_both_sides():
    def program(transport):
        agreed = agreement(transport, num_layers=300)
        if transport.rank == 0:
            agreed.go(Op.SAVE, step=1)
        agreed.post_plan(1, np.ones(300, dtype=bool))
        agreed.wait_plan()

    assert all("rank 0: save at step 1; rank 1: step 1 plan" in message for message in failures(2, program))


def test_steps_of_two_optimizers_in_different_order_are_refused():
    def program(transport):
        optimizers = [agreement(transport), agreement(transport)]
        optimizers[transport.rank].go(Op.EXCHANGE, step=0)

    text = "rank 0: step 0 exchange of optimizer 1; rank 1: step 0 exchange of optimizer 2"
    assert all(text in message for message in failures(2, program))


def test_optimizers_of_different_sizes_meet_in_headers_of_one_size():
    def program(transport):
        optimizers = [agreement(transport, num_layers=size) for size in (200, 3)]
        for agreed, size in zip(optimizers, (200, 3), strict=True):
            agreed.post_plan(0, np.ones(size, dtype=bool))
            assert agreed.wait_plan().all()
        optimizers[transport.rank].go(Op.EXCHANGE, step=0)

    text = "rank 0: step 0 exchange of optimizer 1; rank 1: step 0 exchange of optimizer 2"
    assert all(text in message for message in failures(2, program))


def test_a_rank_that_exits_meets_one_that_builds_an_optimizer_of_any_size():
    def program(transport):
        agreement(transport, num_layers=200, num_values=201).finish()
        if transport.rank == 1:
            leave(transport)
        agreement(transport, num_layers=500)

    text = "rank 0: construction of an optimizer; rank 1: exit of the process"
    assert all(text in message for message in failures(2, program))


def test_after_a_difference_every_further_use_is_refused_and_finish_does_nothing():
    def program(transport):
        agreed = agreement(transport)
        with pytest.raises(DesyncError):
            agreed.go(Op.SAVE, step=transport.rank)
        agreed.finish()
        transport.borrower_met = DesyncError("another optimizer's, which goes on")
        agreed.finish()
        with pytest.raises(JointSparError, match="finished or disagreed"):
            agreed.go(Op.SAVE, step=0)
        with pytest.raises(JointSparError, match="finished or disagreed"):
            agreed.post_plan(0, np.ones(3, dtype=bool))
        return "refused"

    assert run_threads(2, program) == ["refused", "refused"]


def test_a_load_replaces_the_plan_that_was_posted_before_it():
    def program(transport):
        agreed = agreement(transport)
        agreed.post_plan(9, np.ones(3, dtype=bool))
        agreed.go(Op.LOAD, step=9)
        agreed.post_plan(2, np.zeros(3, dtype=bool))
        return agreed.wait_plan().any()

    assert run_threads(2, program) == [False, False]


def test_a_plan_stays_until_the_next_one_is_posted():
    def program(transport):
        agreed = agreement(transport)
        with pytest.raises(JointSparError, match="without a post_plan"):
            agreed.wait_plan()
        agreed.post_plan(0, np.ones(3, dtype=bool))
        return agreed.wait_plan().all() and agreed.wait_plan().all()

    assert run_threads(2, program) == [True, True]


def test_a_plan_that_could_not_be_waited_for_is_still_the_one_in_force():
    """Another optimizer's exchange during backward failed first."""

    def program(transport):
        agreed = agreement(transport)
        agreed.post_plan(0, np.ones(3, dtype=bool))
        agreed.wait_plan()
        agreed.post_plan(1, np.zeros(3, dtype=bool))
        transport.borrower_met = DesyncError("the other optimizer's")
        with pytest.raises(DesyncError, match="the other optimizer's"):
            agreed.wait_plan()
        return agreed.wait_plan().any()

    assert run_threads(2, program) == [False, False]


def test_finish_tells_what_an_exchange_during_backward_met():
    def program(transport):
        agreed = agreement(transport)
        with pytest.raises(DesyncError) as met:
            agreed.go(Op.OVERLAP, step=transport.rank)
        transport.borrower_met = met.value
        with pytest.raises(DesyncError, match="different things"):
            agreed.finish()
        return "told"

    assert run_threads(2, program) == ["told", "told"]


class Answering:
    """A transport whose other rank sends whatever the test says."""

    is_simulated = False
    is_closed = True
    rank, world_size = 0, 2

    def __init__(self):
        self.answer = lambda words: words

    def start_headers(self, words, *, what):
        rows = np.stack([words, np.resize(self.answer(words), words.size)])
        return type("Pending", (), {"wait": lambda self: rows})()


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INT64, min_size=1, max_size=200), st.lists(st.tuples(st.integers(0, 15), INT64), max_size=3))
def test_whatever_another_rank_sends_is_an_agreement_or_a_desync_error(noise, changes):
    def changed(words):
        words = words.copy()
        for place, value in changes:
            words[place] = value
        return words

    for answer in (changed, lambda words: np.array(noise, dtype=np.int64)):
        for calls_before in (0, 1):
            transport = Answering()
            try:
                if calls_before == 0:
                    transport.answer = answer
                agreed = agreement(transport)
                transport.answer = answer
                agreed.post_plan(0, np.ones(3, dtype=bool))
                assert agreed.wait_plan().shape == (2, 3)
                agreed.go(Op.EXCHANGE, step=0, values=np.ones(2))
            except DesyncError:
                pass


def test_another_version_or_program_is_refused():
    transport = Answering()
    transport.answer = lambda words: words + (np.arange(words.size) == 0)
    with pytest.raises(DesyncError, match=r"ranks \[1\] sent no header of this version"):
        agreement(transport)


def test_bad_arguments_are_named():
    agreed = agreement(local())
    with pytest.raises(ValueError, match="active must be"):
        agreed.post_plan(0, np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="values must be"):
        agreed.go(Op.EXCHANGE, step=0, values=np.ones(3))
    with pytest.raises(ValueError, match="layer_hashes"):
        agreement(local(), layer_hashes=[1])
    with pytest.raises(ValueError, match="settings"):
        agreement(local(), settings={str(k): k for k in range(65)})


class Colour(Enum):
    RED = 1


@dataclass
class Options:
    budget: float = 0.5


def test_stable_hash_is_the_same_in_every_run():
    value = {"b": [1, 2.5, None, True, "x", b"y", torch.float32], "a": np.arange(3), "e": Colour.RED, "o": Options()}
    assert stable_hash(value) == stable_hash(dict(reversed(value.items())))
    assert stable_hash(value) == 172643269755510988
    assert 0 <= stable_hash("any") < 2**63


def test_stable_hash_tells_kinds_order_and_bytes_apart():
    values = [
        *(
            0,
            0.0,
            -0.0,
            False,
            None,
            "",
            b"",
            "0",
            [],
            {},
            [0],
            [[0]],
            [0, 0],
            ["ab", "c"],
            ["a", "bc"],
            [1, 2],
            [2, 1],
        ),
        *({"a": 1}, {"a": 2}, {"b": 1}, float("nan"), float("inf"), Colour.RED, Options(), Options(0.25)),
        *(np.zeros(2), np.zeros(2, dtype=np.float32), np.zeros((2, 1)), np.zeros(4, dtype=np.float32)),
        *(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.float32, torch.zeros(2, 2).T[:1]),
    ]
    assert len({stable_hash(value) for value in values}) == len(values)


def test_stable_hash_ignores_memory_layout_and_scalar_library():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert stable_hash(matrix.T) == stable_hash(matrix.T.contiguous())
    assert stable_hash(np.float64(0.5)) == stable_hash(0.5)
    assert stable_hash(np.int64(3)) == stable_hash(3)
    assert stable_hash((1, 2)) == stable_hash([1, 2])


@pytest.mark.parametrize("value", [object(), np.array([object()]), {1, 2}, print, Options])
def test_stable_hash_refuses_what_could_differ_between_ranks(value):
    with pytest.raises(TypeError, match="no stable hash"):
        stable_hash(value)
