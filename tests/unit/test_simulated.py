"""Simulated ranks: the transport's contract, and what becomes of all ranks when one of them fails."""

import gc
import os
import runpy
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jointspar import backends, survivors
from jointspar.comm import run_simulated
from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op
from jointspar.errors import CollectiveTimeout, DesyncError, JointSparError, RanksLost
from jointspar.ops import serving
from jointspar.step.exchange import candidates

MPI_TESTS = Path(__file__).parents[1] / "mpi"


def functions_of(name):
    """What real ranks run in tests/mpi, by name."""
    return runpy.run_path(str(MPI_TESTS / name))


def header(transport, *words, what="step 1"):
    return transport.start_headers(np.array(words, dtype=np.int64), what=what).wait()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_transport_moves_all_dtypes_and_refuses_bad_arguments(world_size):
    checks = functions_of("test_transports.py")

    def use(transport):
        assert (transport.name, transport.world_size) == ("simulated", world_size)
        for name in ("check_data", "check_headers", "check_refusals", "check_forked_child_is_refused"):
            checks[name](transport)
        transport.close()
        transport.close()
        with pytest.raises(JointSparError, match="closed"):
            transport.allreduce(torch.ones(4), what="test")
        return transport.rank

    assert run_simulated(world_size, use) == list(range(world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_exchanges_sum_over_ranks_with_the_same_bits_everywhere(world_size):
    checks = functions_of("test_exchange.py")

    def use(transport):
        for dtype in checks["FLOATS"]:
            for name in ("allreduce", "ring", "two_shot"):
                exchange = candidates(name, transport, dtype)[name]
                checks["check_sums"](transport, exchange, dtype)
                if name == "two_shot":
                    checks["check_sums"](transport, exchange, dtype, checks["slices_of"])
        checks["check_ring_bytes"](transport)
        checks["check_two_shot_bytes"](transport)
        checks["check_large"](transport)

    run_simulated(world_size, use)


def test_optimizers_compute_what_the_formulas_say():
    training = functions_of("test_training.py")

    def use(transport):
        training["mean_grad_is_what_the_strategy_says"]()
        training["a_nan_on_one_rank_is_skipped_on_all"]()
        training["found_inf_on_one_rank_is_skipped_on_all_and_scales_may_differ"]()
        training["two_shot_sends_less_than_the_ring"]()
        training["buffers_are_averaged"]()

    run_simulated(3, use)


@pytest.mark.parametrize(("world_size", "settings", "is_ever_idle"), [
    (4, {}, False),
    (4, {"p_min": 0.1}, True),
    (2, {}, False),
])  # fmt: skip
def test_by_default_no_layer_stands_still(world_size, settings, is_ever_idle):
    """Though the first of them has nearly all of the gradient's norm."""

    def use(transport):
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        optimizer = js.JointSparSGD(layers.named_parameters(), lr=0.0, sampling=js.Sampling(budget=0.5, **settings))
        active = []
        for _ in range(60):
            active.append(optimizer.active)
            for position, parameter in enumerate(layers.parameters()):
                parameter.grad = torch.full_like(parameter, 0.01 if position > 5 else 1.0)
            optimizer.step()
        return torch.stack(active)

    computed_by = sum(active.long() for active in run_simulated(world_size, use))
    assert (computed_by == 0).any() == is_ever_idle


def test_ranks_that_differ_get_desync_error_on_both(capsys):
    training = functions_of("test_training.py")
    differences = training["DIFFERENCES"]
    # simulated ranks measure nothing that a state could remember, and what is patched for one is patched for all
    left_out = ("states_remember_other_measurements", "shared_draws_differ")
    programs = [program for program in differences if program.__name__ not in left_out]
    for program in programs:
        run_simulated(2, lambda transport, program=program: program())
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DESYNC")]
        assert len(lines) == 2
        assert all(differences[program] in line for line in lines), lines


def test_ranks_on_different_backends_are_refused(monkeypatch):
    """Each rounds in its own way: the weights would drift apart without a word."""
    modules = [backends.load(name) for name in ("native", "reference")]
    monkeypatch.setattr(serving, "_chosen", modules[0])

    def build(transport):
        serving._chosen = modules[transport.rank]  # one rank runs at a time
        js.JointSparLARS(nn.Linear(3, 2).named_parameters())

    with pytest.raises(DesyncError, match="setting 'backend' differs: rank 1 against rank 0"):
        run_simulated(2, build)


def test_ranks_whose_short_messages_differ_in_length_are_refused():
    """As where OMPI_MCA_btl_tcp_eager_limit is set on one host alone: each would cut its messages in its own way."""

    def build(transport):
        transport.eager_bytes = 1000 + transport.rank
        js.JointSparLARS(nn.Linear(3, 2).named_parameters())

    with pytest.raises(DesyncError, match="setting 'eager_bytes' differs: rank 1 against rank 0"):
        run_simulated(2, build)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_mean_gradient_that_one_rank_spoils_before_the_update_is_skipped_on_all(lag):
    def use(transport):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=1.0, lag=lag))
        for is_spoilt in (True, False):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            model(torch.ones(4, 3)).sum().backward()
            optimizer.synchronize()
            if is_spoilt and transport.rank == 1:
                optimizer.mean_grads["weight"].fill_(float("nan"))
            optimizer.step()
            assert torch.equal(before, model.weight) == is_spoilt
        assert optimizer.stats.skipped_steps == 1

    run_simulated(2, use)


def test_auto_does_not_measure_what_has_no_link():
    def use(transport):
        assert list(candidates("auto", transport, torch.bfloat16)) == ["allreduce"]

    run_simulated(2, use)


def test_allreduce_adds_in_the_order_of_ranks():
    values = torch.tensor([1.0, 2.0**-24, 2.0**-24, -1.0])  # exact sum 2**-23; in order, each small one is rounded away

    def use(transport):
        buffer = values[transport.rank : transport.rank + 1].clone()
        transport.allreduce(buffer, what="sum")
        return buffer.item()

    assert run_simulated(4, use) == [0.0] * 4


def test_one_rank_runs_at_a_time_in_the_order_of_ranks():
    seen = []

    def use(transport):
        for step in range(3):
            seen.append((step, transport.rank))
            header(transport, step)

    run_simulated(4, use)
    assert seen == [(step, rank) for step in range(3) for rank in range(4)]


def test_rank_0_runs_on_the_calling_thread():
    threads = run_simulated(2, lambda transport: threading.current_thread())
    assert threads[0] is threading.current_thread()
    assert threads[1] is not threads[0]


def test_world_is_the_simulated_rank_inside_and_what_it_was_outside():
    outside = js.comm.world()
    assert run_simulated(3, lambda transport: js.comm.world() is transport) == [True] * 3
    assert js.comm.world() is outside


def test_a_simulation_within_a_rank_is_a_world_of_its_own():
    def outer(transport):
        inner = run_simulated(2, lambda inside: int(header(inside, inside.rank).sum()))
        return inner, js.comm.world() is transport, header(transport, 10 * transport.rank).tolist()

    assert run_simulated(2, outer) == [([1, 1], True, [[0], [10]])] * 2


def test_each_rank_has_its_own_random_numbers_as_a_process_has():
    def use(transport):
        torch.manual_seed(transport.rank)
        numbers = []
        for _ in range(3):
            numbers.append(torch.rand(()).item())
            header(transport, 0)
        return numbers

    def alone(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand((), generator=generator).item() for _ in range(3)]

    assert run_simulated(3, use) == [alone(seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(4, generator=generator)[3]
    assert torch.rand(()) == expected  # the caller goes on where rank 0 was


def test_done_lets_the_sender_run():
    def use(transport):
        buffer = torch.zeros(1)
        if transport.rank == 1:
            transport.start_send(torch.ones(1), 0, what="send").wait()
            return 1.0
        pending = transport.start_receive(buffer, 1, what="receive")
        while not pending.done():
            pass
        return buffer.item()

    assert run_simulated(2, use) == [1.0, 1.0]


def test_an_exception_on_one_rank_ends_the_others_at_their_next_operation():
    reached, errors, num_threads = [], {}, threading.active_count()

    def use(transport):
        for step in range(5):
            header(transport, step, what=f"step {step}")
            if step == 2 and transport.rank == 1:
                raise ZeroDivisionError("the fault")
            reached.append((step, transport.rank))

    def note(transport):
        try:
            use(transport)
        except JointSparError as error:
            errors[transport.rank] = str(error)
            raise

    with pytest.raises(ZeroDivisionError, match="the fault") as caught:
        run_simulated(3, note)
    assert getattr(caught.value, "__notes__", ["on simulated rank 1"]) == ["on simulated rank 1"]  # from Python 3.11 on
    assert errors.keys() == {0, 2}
    assert all("rank 1 ended with ZeroDivisionError: the fault" in text for text in errors.values())
    assert max(reached) == (2, 2)
    assert threading.active_count() == num_threads


def test_after_a_failure_no_rank_starts_what_would_be_in_vain():
    computed = []

    def use(transport):
        for step in range(5):
            header(transport, step)
            if step == 2 and transport.rank == 1:
                raise ZeroDivisionError("the fault")
            plan = transport.start_headers(np.zeros(1, dtype=np.int64), what="plan")
            computed.append((step, transport.rank))
            plan.wait()

    with pytest.raises(ZeroDivisionError):
        run_simulated(3, use)
    assert computed[6:] == [(2, 0)]  # rank 2 was to come after rank 1


@pytest.mark.parametrize("place", ["exchange", "broadcast", "message"])
def test_a_rank_that_fails_is_noticed_wherever_the_others_wait(place):
    def use(transport):
        if transport.rank == 2:
            raise ZeroDivisionError("the fault")
        if place == "exchange":
            transport.allreduce(torch.ones(4), what="step 1")
        elif place == "broadcast":
            transport.broadcast(torch.ones(4), 2, what="step 1")
        else:
            transport.start_receive(torch.ones(4), 2, what="step 1").wait()

    with pytest.raises(ZeroDivisionError):
        run_simulated(3, use)


def test_ranks_that_wait_for_each_other_are_told_at_once():
    texts = {}

    def use(transport):
        with pytest.raises(CollectiveTimeout) as caught:
            transport.start_receive(torch.ones(4), 1 - transport.rank, what=f"receive {transport.rank}").wait()
        texts[transport.rank] = str(caught.value)
        with pytest.raises(JointSparError, match="cannot be used any more"):
            transport.allreduce(torch.ones(4), what="step 8")
        raise caught.value

    with pytest.raises(CollectiveTimeout, match="rank 0: receive 0: no answer can come"):
        run_simulated(2, use)
    assert all("rank 0: receive 0; rank 1: receive 1" in texts[rank] for rank in range(2))


def test_a_rank_that_returns_early_is_a_desync_on_the_others():
    def use(transport):
        if transport.rank == 0:
            model = nn.Linear(4, 4)
            js.JointSparSGD(model.named_parameters())

    with pytest.raises(DesyncError, match="rank 0: construction of an optimizer; rank 1: exit of the process"):
        run_simulated(2, use)


def test_a_longer_message_than_expected_is_an_error():
    def use(transport):
        if transport.rank == 0:
            transport.start_send(torch.ones(100), 1, what="send").wait()
        else:
            transport.start_receive(torch.ones(10), 0, what="receive 3").wait()

    with pytest.raises(JointSparError, match="rank 1: receive 3: rank 0 sent 400 bytes, not 40"):
        run_simulated(2, use)


def test_collectives_that_do_not_belong_together_are_an_error():
    def use(transport):
        if transport.rank == 0:
            transport.allreduce(torch.ones(4), what="step 1")
        else:
            transport.allreduce(torch.ones(5), what="step 1")

    with pytest.raises(JointSparError, match=r"rank 0: step 1: rank 1 came with .*5.*, rank 0 with .*4"):
        run_simulated(2, use)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_all_ranks():
    def use(transport):
        for step in range(100):
            if step == 3 and transport.rank == 1:
                os.kill(os.getpid(), 2)
            header(transport, step)

    with pytest.raises(KeyboardInterrupt):
        run_simulated(3, use)


def test_an_optimizer_that_was_not_finished_is_not_waited_for_at_exit():
    program = """
import torch, jointspar as js
kept = []
def use(transport):
    model = torch.nn.Linear(4, 4)
    kept.append(js.JointSparSGD(model.named_parameters()))
js.comm.run_simulated(3, use)
print("done", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.mark.usefixtures("uncollected")
def test_when_a_rank_collects_its_garbage_changes_nothing():
    """An optimizer with a schedule is a cycle, which may stand on one rank when it is gone on another."""

    def make_and_drop():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        optimizer = js.JointSparSGD(model.named_parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
        return model

    def use(transport):
        model = make_and_drop()
        if transport.rank == 1:
            gc.collect()
        js.sync_buffers(model)

    run_simulated(2, use)


@pytest.fixture
def uncollected():
    """Garbage is collected where the test says so only."""
    gc.disable()
    yield
    gc.enable()


def test_a_second_loss_leaves_no_rank_with_weights_of_one_step_and_the_count_of_another(monkeypatch):
    """Rank 1 is a step behind, has taken over the weights, and then more ranks die."""
    go = Agreement.go
    dies = {0, 1}

    def lossy(self, op, **arguments):
        if op == Op.LOAD and self._transport.rank in dies:
            raise RanksLost("another rank has died")
        return go(self, op, **arguments)

    monkeypatch.setattr(survivors, "_shrunk", lambda transport: transport)
    monkeypatch.setattr(Agreement, "go", lossy)

    def use(transport):
        model = nn.Linear(4, 4)
        optimizer = js.JointSparSGD(model.named_parameters(), lr=0.1, sampling=js.Sampling(budget=1.0))
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        if transport.rank == 0:  # made a step more than rank 1, in which others died
            optimizer._pipeline.step_count += 1
            with torch.no_grad():
                model.weight += 100.0
        with pytest.raises(RanksLost):
            optimizer.shrink()
        first = model.weight.mean().item(), optimizer._pipeline.step_count
        dies.discard(transport.rank)
        return first, (optimizer.shrink(), model.weight.mean().item())

    for (weight, count), (step, later) in run_simulated(2, use):
        assert weight > 50.0 and count == 3
        assert step == 3 and later == weight


@pytest.mark.parametrize("keeps_error", [False, True])
def test_a_failed_simulation_keeps_no_model(keeps_error):
    """Whoever keeps the error keeps the frames of the rank that it is of, and no other's."""
    models = {}

    def use(transport):
        model = nn.Linear(4, 4)
        models[transport.rank] = weakref.ref(model)
        optimizer = js.JointSparSGD(model.named_parameters())
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        if transport.rank == 1:
            raise ZeroDivisionError("the fault")
        optimizer.step()

    kept = []
    try:
        run_simulated(3, use)
    except ZeroDivisionError as error:
        kept += [error] if keeps_error else []
    gc.collect()
    assert [rank for rank in range(3) if models[rank]() is not None] == ([1] if keeps_error else [])


def test_a_world_without_ranks_is_refused():
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        run_simulated(0, lambda transport: None)
