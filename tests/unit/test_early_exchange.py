"""overlap=True in one process and among simulated ranks: what it must not change, and what it refuses."""

from __future__ import annotations

import gc
import threading
import types
import warnings
import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import jointspar as js
from jointspar import pipeline
from jointspar.comm.refusals import CheckedTransport
from jointspar.early_exchange import EarlyExchange
from jointspar.errors import JointSparError, RanksLost
from jointspar.step.packing import Packer


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BUCKET_BYTES", 100)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def make_optimizer(model: Any, **settings: Any) -> Any:
    named = model.items() if isinstance(model, dict) else model.named_parameters()
    return js.JointSparLARS(named, **({"overlap": True, "comm": js.comm.local()} | settings))


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    return nn.functional.cross_entropy(model(inputs), labels)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_buckets_hold_every_slice_once_and_the_last_parameters_first() -> None:
    model = make_model()
    optimizer = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    total = optimizer._pipeline.exchange._begin_sum(grad_scale=1.0)
    positions = [bucket.positions.tolist() for bucket in total.layout.buckets]
    # From the last, in bytes: 12 + 96; 32 + 256; 32 + 32 + 32 + 192.
    assert positions == [[6, 7], [4, 5], [0, 1, 2, 3]]
    starts = [bucket.start for bucket in total.layout.buckets]
    assert starts == sorted(starts) and starts[0] == 0
    assert (
        starts[-1] + total.layout.buckets[-1].total == total.layout.total == sum(p.numel() for p in model.parameters())
    )


def test_a_bucket_gives_each_rank_about_as_much_to_send() -> None:
    parameters = [torch.zeros(size) for size in (25, 50, 25, 25, 25, 30)]
    packer = Packer(parameters, list("abcdef"), None, bucket_bytes=100)
    computed = np.array([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]], dtype=bool)
    # From the last: 0/120, then 100/120, which is even; 100/0, 100/100; 0/200, and the rest.
    layout = packer.layout(computed)
    assert [bucket.positions.tolist() for bucket in layout.buckets] == [[4, 5], [3, 2], [0, 1]]
    everything = packer.layout(np.ones((2, 6), dtype=bool))
    assert [bucket.positions.tolist() for bucket in everything.buckets] == [[5], [4], [3], [2], [1], [0]]
    assert [bucket.positions.tolist() for bucket in packer.layout(np.zeros((2, 6), dtype=bool)).buckets] == [[]]


@pytest.mark.parametrize("strategy", ["stratified", "independent", "shared"])
@pytest.mark.parametrize("lag", [0, 1])
def test_simulated_ranks_train_as_without(strategy: str, lag: int) -> None:
    def run(overlap: bool) -> list[Any]:
        def train(transport: Any) -> Any:
            model = make_model(transport.rank)
            sampling = js.Sampling(strategy=strategy, p_min=0.1, lag=lag)
            optimizer = make_optimizer(model, overlap=overlap, comm=transport, sampling=sampling, exchange="two_shot")
            for step in range(20):
                optimizer.zero_grad()
                loss_of(model, 2 * step + transport.rank).backward()
                optimizer.step(max_norm=1.0)
            return weights(model), optimizer.probabilities, optimizer.stats.total_dense_bytes

        return js.comm.run_simulated(2, train)

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert found[2] == expected[2]


def test_gradients_accumulate_inside_no_sync() -> None:
    results = []
    for overlap in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, overlap=overlap, sampling=js.Sampling(budget=0.75))
        for step in range(6):
            optimizer.zero_grad()
            with optimizer.no_sync():
                loss_of(model, 3 * step).backward()
                loss_of(model, 3 * step + 1).backward()
            loss_of(model, 3 * step + 2).backward()
            optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


def clip(model: nn.Module, optimizer: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def unscale(model: nn.Module, optimizer: Any) -> None:
    """By kernels that autograd's version counter does not see. The loss was not scaled: any factor will do."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(1))
    scaler.unscale_(optimizer)


def clear(model: nn.Module, optimizer: Any) -> None:
    model.zero_grad()


def replace(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad * 2


def negate(model: nn.Module, optimizer: Any) -> None:
    """In place, and to the same norm: autograd's count of writes alone tells."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.neg_()


def accumulate(model: nn.Module, optimizer: Any) -> None:
    loss_of(model, 99).backward()


def set_trainable(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.set_trainable(model[3].parameters(), False)


def scale(model: nn.Module, optimizer: Any) -> None:
    optimizer.grad_scale = torch.tensor(4.0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (clip, "gradients were changed after backward; clip by step"),
        (unscale, "gradients were changed"),
        (clear, "gradients were changed"),
        (replace, "gradients were changed"),
        (negate, "gradients were changed"),
        (accumulate, r"a second backward before step\(\); accumulate inside"),
        (set_trainable, "frozen or thawed"),
        (scale, "a GradScaler"),
    ],
)
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.filterwarnings("ignore:.*was active but got no gradient")
def test_what_was_sent_is_void_where_gradients_change_before_the_step(change: Any, why: str, lag: int) -> None:
    """On one rank only, so that the other learns of it from this one."""

    def run(overlap: bool) -> list[torch.Tensor]:
        def train(transport: Any) -> torch.Tensor:
            model = make_model()
            sampling = js.Sampling(strategy="independent", p_min=0.1, lag=lag)
            optimizer = make_optimizer(model, overlap=overlap, comm=transport, exchange="ring", sampling=sampling)
            is_changed = transport.rank == 1 or change is set_trainable  # on all ranks alike
            for step in range(5):
                optimizer.zero_grad()
                loss_of(model, 2 * step + transport.rank).backward()
                if step == 1 and is_changed:
                    change(model, optimizer)
                optimizer.step()
                optimizer.grad_scale = None
            return torch.cat([weights(model).double(), optimizer.probabilities])

        return js.comm.run_simulated(2, train)

    expected = run(overlap=False)
    with pytest.warns(UserWarning, match=f"overlap=True: what backward of step 1 sent was void.*({why})"):
        found = run(overlap=True)
    assert all(map(torch.equal, found, expected))


def test_a_parameter_that_was_frozen_before_the_step_stays_frozen() -> None:
    """Also where its layer is inactive in the next draw, whose flags are set anew."""
    for seed in range(6):
        results = []
        for overlap in (True, False):
            model = make_model()
            optimizer = make_optimizer(model, overlap=overlap, sampling=js.Sampling(seed=seed, strategy="shared"))
            for step in range(6):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                if step == 1:
                    model[3].requires_grad_(False)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    optimizer.step()
            results.append(weights(model))
        assert torch.equal(*results)


def test_a_backward_after_synchronize_changes_no_mean_gradient() -> None:
    results = []
    for overlap in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, overlap=overlap)
        loss_of(model, 1).backward()
        optimizer.synchronize()
        loss_of(model, 2).backward()
        optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_backward_that_failed_may_be_made_again() -> None:
    results = []
    for overlap in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, overlap=overlap, sampling=js.Sampling(budget=1.0, strategy="shared"))

        def fail(*_: Any) -> None:
            raise ValueError("a mistake")

        handle = model[0].register_full_backward_hook(fail)
        with pytest.raises(ValueError, match="a mistake"):
            loss_of(model).backward()
        handle.remove()
        optimizer.zero_grad()
        loss_of(model).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


def test_mean_grads_may_be_changed_and_are_what_they_are_without() -> None:
    model, other = make_model(), make_model()
    optimizers = [make_optimizer(model), make_optimizer(other, overlap=False)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        loss_of(each).backward()
        optimizer.synchronize()
    found, expected = (dict(optimizer.mean_grads) for optimizer in optimizers)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for optimizer in optimizers:
        for grad in optimizer.mean_grads.values():
            grad.mul_(0.5)
        optimizer.step()
    assert torch.equal(weights(model), weights(other))


def test_a_step_without_any_backward_packs_zeros_and_warns() -> None:
    optimizer = make_optimizer(make_model())
    with pytest.warns(UserWarning, match="was active but got no gradient"):
        optimizer.step()
    assert optimizer.stats.steps == 1


def test_two_optimizers_share_a_loss() -> None:
    """Weights here, biases there; stepped in either order."""

    def run(overlap: bool, order: int) -> list[torch.Tensor]:
        def train(transport: Any) -> torch.Tensor:
            model = make_model()
            named = list(model.named_parameters())
            parts = [[(n, p) for n, p in named if p.ndim == 2], [(n, p) for n, p in named if p.ndim != 2]]
            settings = dict(overlap=overlap, exchange="ring", comm=transport, sampling=js.Sampling(grouping="tensor"))
            optimizers = [make_optimizer(dict(part), **settings) for part in parts]
            for step in range(5):
                model.zero_grad()
                loss_of(model, 2 * step + transport.rank).backward()
                for optimizer in optimizers[::order]:
                    optimizer.step()
            return weights(model)

        return js.comm.run_simulated(2, train)

    for order in (1, -1):
        assert all(map(torch.equal, run(True, order), run(False, order)))


def test_release_and_a_later_optimizer_end_the_watch() -> None:
    model = make_model()
    first = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    second = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    loss_of(model).backward()
    assert second._pipeline.exchange.early._packed and not first._pipeline.exchange.early._packed
    second.step()
    second.release()
    loss_of(model).backward()
    assert not second._pipeline.exchange.early._packed


def test_hooks_do_not_keep_an_optimizer_alive() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    alive = weakref.ref(optimizer._pipeline.exchange.early)
    del optimizer
    gc.collect()
    assert alive() is None
    loss_of(model).backward()


def test_a_layer_that_was_frozen_at_first_is_watched_once_it_trains() -> None:
    results = []
    for overlap in (True, False):
        model = make_model()
        model[3].requires_grad_(False)
        sampling = js.Sampling(budget=1.0, strategy="shared")
        optimizer = make_optimizer(model, overlap=overlap, sampling=sampling)
        for step in range(4):
            if step == 1:
                optimizer.set_trainable(model[3].parameters(), True)
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


def test_what_does_not_go_together_is_refused() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="overlap: expected True or False, got str"):
        make_optimizer(model, overlap="yes")
    compressed = type("Own", (), {"__call__": print, "agreed": str, "name": "own", "is_rank_local": False})()
    with pytest.raises(ValueError, match="overlap: an exchange of your own takes all gradients at once"):
        make_optimizer(model, exchange=compressed)


def test_layers_that_share_a_tensor_checkpoints_and_closures_train_as_without() -> None:
    results = []
    for overlap in (True, False):
        model = make_model()
        model[3].weight = nn.Parameter(torch.eye(8))
        model.append(nn.Tanh())
        model.append(nn.Linear(3, 8, bias=False))
        model.append(nn.Linear(8, 8, bias=False))
        model[-1].weight = model[3].weight  # tied
        optimizer = make_optimizer(model, overlap=overlap, sampling=js.Sampling(budget=0.75))

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            outputs = checkpoint(model, torch.ones(4, 6), use_reentrant=False)
            loss = outputs.square().sum()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_resumed_run_goes_on_as_the_first(tmp_path: Any) -> None:
    def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    model, other = make_model(), make_model(1)
    optimizer = make_optimizer(model)
    steps(model, optimizer, 0, 4)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    steps(model, optimizer, 4, 8)
    resumed = make_optimizer(other)
    loss_of(other).backward()  # what was noted of it is of no use after the load
    js.checkpoint.load(tmp_path, model=other, optimizer=resumed)
    steps(other, resumed, 4, 8)
    assert torch.equal(weights(model), weights(other))


def test_a_transport_that_is_bound_to_one_thread_is_refused() -> None:
    model = make_model()
    transport = types.SimpleNamespace(world_size=2, is_simulated=False, is_thread_safe=False)
    with pytest.raises(JointSparError, match="MPI_THREAD_MULTIPLE"):
        EarlyExchange(cast(Any, transport), [], cast(Any, model.train), cast(Any, model.eval))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_raised_while_it_packed_can_be_made_again(overlap: bool) -> None:
    model = make_model()
    optimizer = make_optimizer(model, overlap=overlap, sampling=js.Sampling(budget=1.0, strategy="shared"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was active but got no gradient"):
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    loss_of(model).backward()
    optimizer.step()
    assert optimizer.stats.steps == 2


def test_backward_may_go_on_after_the_last_step() -> None:
    def run(transport: Any) -> None:
        model = make_model()
        optimizer = make_optimizer(model, comm=transport)
        loss_of(model).backward()
        optimizer.step()
        optimizer.finish()
        loss_of(model).backward()

    js.comm.run_simulated(2, run)


def test_whoever_uses_a_lent_transport_learns_what_the_borrower_met() -> None:
    transport = CheckedTransport(library="test", name="test", rank=0, world_size=2, timeout=1.0)

    def give_back() -> None:
        transport.lend(None)
        raise RanksLost("rank 1 has died")

    transport.lend(threading.get_ident() + 1, give_back)
    transport.fail("other ranks have died")
    with pytest.raises(RanksLost, match="rank 1 has died"):
        transport._check_usable("save")
    with pytest.raises(JointSparError, match="save: the transport cannot be used any more: other ranks have died"):
        transport._check_usable("save")
