"""overlap=True on several ranks: the sums of overlap=False, sent during backward, and all ends that a rank may take."""

from __future__ import annotations

import gc
import itertools
import re
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import jointspar as js
from jointspar import pipeline
from jointspar.comm.heads import Op
from jointspar.comm.transport import Transport
from jointspar.errors import DesyncError

pytestmark = pytest.mark.mpi

STRATEGIES = ("stratified", "independent", "shared")
WIRES = {"allreduce": None, "ring": "bfloat16", "two_shot": None}  # by exchange
SETTINGS: list[tuple[type[Any], dict[str, Any]]] = [
    (js.JointSparLARS, dict(lr=0.5, trust_coefficient=0.02)),
    (js.JointSparSGD, dict(lr=0.05, momentum=0.5, inactive="decay")),
]

BY_MPI = pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)


def make_model() -> nn.Sequential:
    torch.manual_seed(js.comm.world().rank)  # rank 0's weights go to all
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))


def make_optimizer(model: nn.Module, **settings: Any) -> Any:
    return js.JointSparSGD(model.named_parameters(), **({"overlap": True} | settings))


def backward(model: nn.Module) -> None:
    nn.functional.cross_entropy(model(torch.randn(12, 6)), torch.randint(0, 3, (12,))).backward()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def train(kind: type[Any], settings: dict[str, Any], max_norm: float | None) -> tuple[torch.Tensor, js.Stats]:
    model = make_model()
    optimizer = kind(model.named_parameters(), **settings)
    for step in range(12):
        if step == 6:
            optimizer.set_trainable(model[3].parameters(), False)
        optimizer.zero_grad()
        if step % 3 == 0:
            with optimizer.no_sync():
                backward(model)
        backward(model)
        early = optimizer._pipeline.exchange.early
        assert early is None or early._packed or not optimizer.active.any()  # in the midst of backward
        optimizer.step(max_norm=max_norm)
    optimizer.finish()
    return weights(model), optimizer.stats


def train_with_and_without() -> None:
    pipeline._BUCKET_BYTES = 2000
    comm = js.comm.world()
    for (kind, given), strategy, exchange in itertools.product(SETTINGS, STRATEGIES, WIRES):
        sampling = js.Sampling(strategy=strategy, p_min=0.1, lag=int(kind is js.JointSparSGD))
        wire_dtype = WIRES[exchange] if comm.world_size == 2 else None  # 16-bit sums of three depend on their order
        settings = given | {"sampling": sampling, "exchange": exchange, "wire_dtype": wire_dtype}
        max_norm = 5.0 if exchange == "ring" else None
        expected, plain = train(kind, settings, max_norm)
        found, early = train(kind, settings | {"overlap": True}, max_norm)
        case = f"{kind.__name__}, {strategy}, {exchange}"
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if comm.world_size == 2 else 1e-6, msg=case)
        headers = 12 * (comm.world_size - 1) * 8 * 64  # one more a step, of less than 64 words
        shares = 0.2 * plain.total_sent_bytes * (exchange == "two_shot" and comm.world_size > 2)  # which rank sums what
        assert abs(early.total_sent_bytes - plain.total_sent_bytes) < headers + shares, case
        assert early.total_dense_bytes == plain.total_dense_bytes, case


@pytest.mark.parametrize(
    ("launcher", "num_ranks"), [("mpirun", 2), ("mpirun", 3), ("torchrun", 2)], indirect=["launcher"]
)
def test_overlap_changes_no_sum(run_ranks: Any, num_ranks: int) -> None:
    run_ranks(num_ranks, train_with_and_without, timeout=200)


def exchange_before_backward_ends() -> None:
    """The first layer's backward waits until the last layer's bucket has been exchanged."""
    pipeline._BUCKET_BYTES = 2000
    model = make_model()
    optimizer = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    is_exchanged = threading.Event()
    chooser = optimizer._pipeline.chooser
    exchange = chooser.exchange

    def exchange_and_tell(*given: Any, **named: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        exchange(*given, **named)
        is_exchanged.set()

    chooser.exchange = exchange_and_tell

    def wait_for_bucket(*_: Any) -> None:
        assert is_exchanged.wait(30)

    model[0].register_full_backward_hook(wait_for_bucket)
    nn.functional.cross_entropy(model(torch.randn(12, 6, requires_grad=True)), torch.randint(0, 3, (12,))).backward()
    optimizer.step()


@BY_MPI
def test_buckets_travel_while_backward_runs(run_ranks: Any) -> None:
    run_ranks(2, exchange_before_backward_ends)


def leave_between_backward_and_step() -> None:
    model = make_model()
    optimizer = make_optimizer(model, exchange="ring")
    for step in range(2):
        optimizer.zero_grad()
        backward(model)
        if step == 1 and optimizer.comm.rank == 1:
            print(f"FAULT {time.time()}\n", end="", flush=True)
            sys.exit(0)
        optimizer.step()


def leave_in_the_middle_of_backward() -> None:
    """The other rank waits for buckets that this one has not packed."""
    pipeline._BUCKET_BYTES = 2000
    model = make_model()
    optimizer = make_optimizer(model, exchange="ring", sampling=js.Sampling(budget=1.0, strategy="shared"))

    def leave(*_: Any) -> None:
        print(f"FAULT {time.time()}\n", end="", flush=True)
        sys.exit(0)

    if optimizer.comm.rank == 1:
        model[3].register_full_backward_hook(leave)
    backward(model)
    optimizer.step()


@pytest.mark.parametrize("program", [leave_between_backward_and_step, leave_in_the_middle_of_backward])
def test_a_rank_that_exits_during_an_exchange_ends_the_job(run_ranks: Any, program: Any) -> None:
    job = run_ranks(2, program, expect_code=None)
    assert re.search(r"DesyncError: rank [01]: the ranks are about to do different things", job.output)
    assert job.seconds_after("FAULT") < 10


def fail_in_the_middle_of_backward() -> None:
    model = make_model()
    optimizer = make_optimizer(model, exchange="ring", sampling=js.Sampling(budget=1.0, strategy="shared"))

    def fail(*_: Any) -> None:
        print(f"FAULT {time.time()}\n", end="", flush=True)
        raise ValueError("a mistake of the user")

    if optimizer.comm.rank == 1:
        model[3].register_full_backward_hook(fail)
    backward(model)
    optimizer.step()


@BY_MPI
def test_an_error_in_backward_ends_the_job(run_ranks: Any) -> None:
    job = run_ranks(2, fail_in_the_middle_of_backward, expect_code=None)
    assert "a mistake of the user" in job.output
    assert job.seconds_after("FAULT") < 5


def freeze_on_one_rank() -> None:
    model = make_model()
    optimizer = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    if optimizer.comm.rank == 1:
        model[3].weight.requires_grad_(False)
    backward(model)
    with pytest.raises(DesyncError, match="step 0 exchange during backward: "):
        optimizer.step()
    print("AGREED THAT THEY DIFFER")


@BY_MPI
def test_ranks_that_differ_find_it_out_before_any_bucket(run_ranks: Any) -> None:
    assert run_ranks(2, freeze_on_one_rank).output.count("AGREED THAT THEY DIFFER") == 2


def leave_out_a_backward() -> None:
    results = []
    for overlap in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, overlap=overlap, sampling=js.Sampling(budget=1.0, strategy="shared"))
        for step in range(4):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + optimizer.comm.rank)
            if step % 2 != optimizer.comm.rank:  # no data left, say
                backward(model)
            optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore")
@BY_MPI
def test_a_rank_without_a_backward_counts_as_zero(run_ranks: Any) -> None:
    run_ranks(2, leave_out_a_backward)


def meet_between_backward_and_step() -> None:
    """What is sent during backward is void then, and the step as without; also where only one rank has a reason."""
    pipeline._BUCKET_BYTES = 2000
    comm, results = js.comm.world(), []
    for overlap in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, overlap=overlap, exchange="ring", sampling=js.Sampling(strategy="shared"))
        norm = nn.BatchNorm1d(3)
        for step in range(8):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + comm.rank)
            backward(model)
            if step == 1:
                own = torch.full((1000,), float(comm.rank + 1))
                comm.allreduce(own, what="a loss")
                assert (own == 3.0).all()
            if step == 2:
                js.sync_buffers(norm)
            if step == 3:
                make_optimizer(make_model(), overlap=False).finish()
            if step == 4 and comm.rank == 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if step == 5:
                backward(model)
            if step == 6:
                state = optimizer.state_dict()
                optimizer.load_state_dict(state)
                optimizer.zero_grad()
                backward(model)
            optimizer.step()
        backward(model)
        optimizer.finish()  # without a step
        results.append(weights(model))
    assert torch.equal(*results)


@BY_MPI
def test_another_meeting_between_backward_and_step_costs_time_only(run_ranks: Any) -> None:
    run_ranks(2, meet_between_backward_and_step)


def share_a_loss() -> None:
    """Two optimizers that both send during backward, as far as they can; one was asked for its plan before."""
    pipeline._BUCKET_BYTES = 2000
    comm, results = js.comm.world(), []
    for overlap in (True, False):
        model = make_model()
        named = list(model.named_parameters())
        parts = [[(n, p) for n, p in named if p.ndim == 2], [(n, p) for n, p in named if p.ndim != 2]]
        sampling = js.Sampling(grouping="tensor")
        sent_before = comm.bytes_sent
        optimizers = [
            js.JointSparSGD(part, lr=0.1, overlap=overlap, exchange="ring", sampling=sampling) for part in parts
        ]
        for step in range(8):
            optimizers[step % 2].meet(Op.SAVE)
            model.zero_grad()
            torch.manual_seed(10 * step + comm.rank)
            backward(model)
            for optimizer in optimizers[:: 1 if step % 4 < 2 else -1]:
                optimizer.step()
        assert sum(optimizer.stats.total_sent_bytes for optimizer in optimizers) < comm.bytes_sent - sent_before
        results.append(weights(model))
    assert torch.equal(*results)


@BY_MPI
def test_two_optimizers_share_a_loss(run_ranks: Any) -> None:
    run_ranks(2, share_a_loss)


def drop_after_backward() -> None:
    """Nobody steps, and another optimizer is built."""
    results = []
    for overlap in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, overlap=overlap)
        backward(model)
        del optimizer
        gc.collect()
        optimizer = make_optimizer(model, overlap=overlap, exchange="ring")
        torch.manual_seed(optimizer.comm.rank)
        backward(model)
        optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


@BY_MPI
def test_an_optimizer_may_be_dropped_after_backward(run_ranks: Any) -> None:
    run_ranks(2, drop_after_backward)


def set_overlap_on_one_rank() -> None:
    comm: Transport = js.comm.world()
    with pytest.raises(DesyncError, match="setting 'overlap' differs"):
        make_optimizer(make_model(), overlap=comm.rank == 0)
    print("AGREED THAT THEY DIFFER")


@BY_MPI
def test_overlap_is_the_same_on_all_ranks(run_ranks: Any) -> None:
    assert run_ranks(2, set_overlap_on_one_rank).output.count("AGREED THAT THEY DIFFER") == 2
