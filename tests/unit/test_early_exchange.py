"""overlap=True in one process and among simulated ranks: what it must not change, and what it refuses."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jointspar import pipeline
from jointspar.early_exchange import EarlyExchange
from jointspar.errors import JointSparError
from jointspar.step.packing import Packer


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BUCKET_BYTES", 100)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def make_optimizer(model: nn.Module, **settings: Any) -> Any:
    return js.JointSparLARS(model.named_parameters(), **({"overlap": True, "comm": js.comm.local()} | settings))


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    return nn.functional.cross_entropy(model(inputs), labels)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_buckets_hold_every_slice_once_and_the_last_parameters_first() -> None:
    model = make_model()
    optimizer = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    total = optimizer._pipeline._begin_sum(grad_scale=1.0)
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
            sampling = js.Sampling(strategy=strategy, lag=lag)
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


def test_a_second_backward_is_refused() -> None:
    model = make_model()
    make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    loss_of(model).backward()
    with pytest.raises(JointSparError, match=r"a second backward before step\(\).*no_sync"):
        loss_of(model).backward()


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clear(model: nn.Module) -> None:
    model.zero_grad()


def accumulate_quietly(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 2


@pytest.mark.parametrize("change", [clip, clear, accumulate_quietly])
def test_gradients_that_were_changed_after_they_were_sent_are_noticed(change: Any) -> None:
    model = make_model()
    optimizer = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    before = weights(model)
    loss_of(model).backward()
    change(model)
    with pytest.raises(JointSparError, match=r"changed between backward and step\(\)"):
        optimizer.step()
    assert torch.equal(weights(model), before)


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


def test_nothing_else_meets_the_ranks_between_backward_and_step(tmp_path: Any) -> None:
    def run(transport: Any) -> None:
        model = make_model()
        optimizer = make_optimizer(model, comm=transport)
        state = optimizer.state_dict()
        loss_of(model).backward()
        for call in (
            lambda: js.checkpoint.save(tmp_path, model=model, optimizer=optimizer),
            lambda: optimizer.load_state_dict(state),
            lambda: js.sync_buffers(nn.BatchNorm1d(3), comm=transport),
            lambda: optimizer.set_trainable(model[3].parameters(), False),
            optimizer.finish,
        ):
            with pytest.raises(JointSparError, match=r"between backward and step\(\)"):
                call()
        optimizer.step()
        loss_of(model).backward()
        optimizer.step()

    js.comm.run_simulated(2, run)


def test_two_optimizers_take_turns() -> None:
    """The second's gradients wait for its step, and its step for the first's."""

    def run(transport: Any) -> list[torch.Tensor]:
        models = [make_model(1), make_model(2)]
        first, second = (make_optimizer(model, comm=transport) for model in models)
        loss_of(models[0]).backward()
        loss_of(models[1]).backward()
        with pytest.raises(JointSparError, match=r"between backward and step\(\)"):
            second.step()
        first.step()
        second.step()
        return [weights(model) for model in models]

    def run_plainly(transport: Any) -> list[torch.Tensor]:
        models = [make_model(1), make_model(2)]
        for optimizer, model in [(make_optimizer(model, comm=transport, overlap=False), model) for model in models]:
            loss_of(model).backward()
            optimizer.step()
        return [weights(model) for model in models]

    for found, expected in zip(js.comm.run_simulated(2, run), js.comm.run_simulated(2, run_plainly), strict=True):
        assert all(map(torch.equal, found, expected))


def test_release_and_a_later_optimizer_end_the_watch() -> None:
    model = make_model()
    first = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    second = make_optimizer(model, sampling=js.Sampling(budget=1.0, strategy="shared"))
    loss_of(model).backward()
    assert second._pipeline.early.is_under_way and not first._pipeline.early.is_under_way
    second.step()
    second.release()
    loss_of(model).backward()
    assert not second._pipeline.early.is_under_way


def test_hooks_do_not_keep_an_optimizer_alive() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    alive = weakref.ref(optimizer._pipeline.early)
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
    optimizer = make_optimizer(model)
    loss_of(model).backward()
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(JointSparError, match="GradScaler"):
        optimizer.step()


def test_a_transport_that_is_bound_to_one_thread_is_refused() -> None:
    transport = types.SimpleNamespace(world_size=2, is_simulated=False, can_change_threads=False)
    nothing: Any = None
    with pytest.raises(JointSparError, match="MPI_THREAD_SERIALIZED"):
        EarlyExchange(cast(Any, transport), [], nothing, nothing)
