"""The optimizer's path on a device, rehearsed on the host: with lag=1 no step reads what it has only just started.

A Reading is where values come back from a device. On the host it has its values at once, so a stand-in notes instead
when each one was made and when somebody waited for it.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import is_tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jointspar as js
from jointspar import gradient_exchange, learning, ops, pipeline
from jointspar.device_arrays import Reading, refuse_capture
from jointspar.errors import JointSparError
from jointspar.step.update import LarsUpdate, SgdUpdate

OPERATIONS = (
    "sample_layers", "project_probabilities", "update_probabilities", "pack_gradients", "unpack_gradients",
    "add_packed", "squared_norms", "lars_update", "sgd_update",
)  # fmt: skip


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, **arguments: float) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step(**arguments)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Diary:
    """Which step is under way, and which readings were waited for in the step that made them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        self.num_made = 0
        self.waited_at_once = 0
        diary = self

        class NotedReading(Reading):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments)  # type: ignore[arg-type]
                self.made = diary.now
                diary.num_made += 1

            def wait(self):
                diary.waited_at_once += self.made == diary.now
                return super().wait()

        for module in (pipeline, learning, gradient_exchange):
            monkeypatch.setattr(module, "Reading", NotedReading)


@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
@pytest.mark.parametrize("strategy", ["independent", "stratified", "shared"])
@pytest.mark.parametrize("distribution", ["norm", "bandit", "uniform"])
@pytest.mark.parametrize("arguments", [{}, {"max_norm": 0.1}], ids=["plain", "clipped"])
def test_with_lag_nothing_is_waited_for_in_the_step_that_computes_it(
    kind, strategy, distribution, arguments, monkeypatch
):
    diary = Diary(monkeypatch)
    model = make_model()
    p_min = None if distribution == "uniform" else 0.1
    sampling = js.Sampling(0.5, p_min, strategy=strategy, distribution=distribution, lag=1)
    optimizer = kind(model.named_parameters(), sampling=sampling)
    for diary.now in range(12):
        step(model, optimizer, seed=diary.now, **arguments)
    assert diary.num_made >= 24
    assert diary.waited_at_once == 0


def test_a_step_is_not_captured_in_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(JointSparError, match="replays would repeat one draw"):
        refuse_capture(torch.device("cuda:0"))
    refuse_capture(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_capture(torch.device("cuda:0"))


def test_a_reading_that_is_there_is_not_waited_for():
    reading = Reading(np.array([1.0, 2.0]))
    calls = []
    reading._event = SimpleNamespace(query=lambda: True, synchronize=lambda: calls.append("waited"))
    assert reading.wait().tolist() == [1.0, 2.0] and calls == []
    reading = Reading(np.array([3.0]))
    reading._event = SimpleNamespace(query=lambda: False, synchronize=lambda: calls.append("waited"))
    assert reading.wait().tolist() == [3.0] and calls == ["waited"]


@pytest.mark.parametrize(("kind", "update"), [(js.JointSparLARS, LarsUpdate), (js.JointSparSGD, SgdUpdate)])
def test_without_lag_nothing_is_read_back_that_comes_after_the_update(kind, update, monkeypatch):
    diary = Diary(monkeypatch)
    apply = update.apply
    made_before_update = []

    def noted(*arguments, **settings):
        made_before_update.append(diary.num_made)
        return apply(*arguments, **settings)

    monkeypatch.setattr(update, "apply", noted)
    model = make_model()
    optimizer = kind(model.named_parameters(), sampling=js.Sampling(budget=0.5))
    for seed in range(3):
        step(model, optimizer, seed=seed)
        assert diary.num_made == made_before_update[-1] > 0
    assert diary.waited_at_once > 0


def test_settings_in_an_array_of_cupy_are_read_by_cupy_itself(monkeypatch):
    """On its own stream, in order with what computed them there."""
    devices = []
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=_Entered(devices))))

    class OnDevice:
        __module__ = "cupy.stand_in"

        def __dlpack_device__(self):
            return 2, 3

        def get(self):
            assert devices == [3]
            return np.array([2.0, 3.0])

    grads = [torch.ones(2), torch.ones(1)]
    packed, _ = ops.pack_gradients(grads, OnDevice())
    assert packed.tolist() == [2.0, 2.0, 3.0]


class _Entered:
    """Notes the arguments of the contexts that are entered now."""

    def __init__(self, now):
        self._now = now

    @contextmanager
    def __call__(self, argument):
        self._now.append(argument)
        yield
        self._now.pop()


def test_without_lag_the_norms_are_read_in_the_same_step(monkeypatch):
    diary = Diary(monkeypatch)
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=0.5))
    step(model, optimizer, seed=0)
    assert diary.waited_at_once > 0


@pytest.mark.parametrize("inactive", ["skip", "decay"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
def test_a_step_takes_at_most_six_operations_whatever_the_number_of_tensors(kind, lag, inactive, monkeypatch):
    calls: list[str] = []
    for name in OPERATIONS:
        original = getattr(ops, name)

        def counted(*arguments, _name=name, _original=original, **settings):
            calls.append(_name)
            return _original(*arguments, **settings)

        monkeypatch.setattr(ops, name, counted)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(40)))
    sampling = js.Sampling(budget=0.5, lag=lag)
    optimizer = kind(model.named_parameters(), inactive=inactive, sampling=sampling)
    for seed in range(3):
        calls.clear()
        step(model, optimizer, seed=seed)
        assert 1 <= len(calls) <= 6


def test_the_packed_buffer_stays_where_it_is_once_it_has_seen_the_largest_set():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=2, lag=1))
    places = set()
    for seed in range(40):
        step(model, optimizer, seed=seed)
        if seed >= 20:
            places.add(optimizer._pipeline.packer._buffer.data_ptr())
    assert len(places) == 1


class NoNumberIsRead(TorchDispatchMode):
    """`item()`, `float(tensor)` and the like would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
@pytest.mark.parametrize("strategy", ["independent", "stratified", "shared"])
def test_with_lag_no_number_is_read_out_of_a_tensor(kind, strategy):
    model = make_model()
    optimizer = kind(model.named_parameters(), sampling=js.Sampling(budget=0.5, strategy=strategy, lag=1))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        with NoNumberIsRead():
            optimizer.step()


class Allocations(TorchDispatchMode):
    """The bytes of every storage that a torch operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        made = [tensor.untyped_storage() for tensor in tree_leaves(result) if is_tensor(tensor)]
        self.num_bytes += [storage.nbytes() for storage in made if storage.data_ptr() not in known]
        return result


@pytest.mark.parametrize("inactive", ["skip", "decay"])
@pytest.mark.parametrize("arguments", [{}, {"max_norm": 0.1}], ids=["plain", "clipped"])
@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
def test_in_the_steady_state_a_step_allocates_some_numbers_a_tensor_and_nothing_as_large_as_one(
    kind, arguments, inactive
):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    num_tensors, smallest_weight = 24, 64 * 64 * 4
    sampling = js.Sampling(budget=0.5, lag=1)
    optimizer = kind(model.named_parameters(), inactive=inactive, sampling=sampling)
    allocations = Allocations()
    for seed in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        with allocations:
            optimizer.step(**arguments)
        if seed == 0:
            assert max(allocations.num_bytes) >= smallest_weight  # the packed buffer: it would be seen
        if seed == 20:
            allocations.num_bytes.clear()
    assert max(allocations.num_bytes, default=0) <= 2 * 8 * num_tensors


@pytest.mark.parametrize("distribution", ["norm", "bandit"])
def test_with_lag_the_probabilities_follow_one_step_later(distribution):
    probabilities = {}
    for lag in (0, 1):
        model = make_model()
        sampling = js.Sampling(budget=0.5, p_min=0.1, distribution=distribution, lag=lag)
        optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling)
        probabilities[lag] = [optimizer.probabilities]
        for seed in range(2):
            step(model, optimizer, seed=seed)
            probabilities[lag].append(optimizer.probabilities)
    initial = probabilities[0][0]
    assert torch.equal(probabilities[1][0], initial)
    assert torch.equal(probabilities[1][1], initial)
    assert torch.equal(probabilities[1][2], probabilities[0][1])
    assert not torch.equal(probabilities[0][1], initial)


@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
@pytest.mark.parametrize("inactive", ["skip", "decay"])
def test_with_lag_and_fixed_probabilities_the_steps_are_those_without(kind, inactive):
    results = []
    for lag in (0, 1):
        model = make_model()
        sampling = js.Sampling(budget=0.5, distribution="uniform", lag=lag)
        optimizer = kind(model.named_parameters(), inactive=inactive, sampling=sampling)
        for seed in range(10):
            step(model, optimizer, seed=seed)
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("inactive", ["skip", "decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_with_lag_a_non_finite_step_is_skipped_and_counted_one_step_later(value, inactive):
    model = make_model()
    sampling = js.Sampling(budget=0.5, p_min=0.1, lag=1)
    optimizer = js.JointSparLARS(model.named_parameters(), inactive=inactive, sampling=sampling)
    for seed in range(3):
        step(model, optimizer, seed=seed)
    before, probabilities = weights(model), optimizer.probabilities
    optimizer.zero_grad()
    model(torch.randn(8, 6)).square().mean().backward()
    next(parameter for parameter in model.parameters() if parameter.grad is not None).grad.flatten()[0] = value
    optimizer.step()
    assert torch.equal(weights(model), before)
    assert optimizer.stats.skipped_steps == 0
    learnt = optimizer.probabilities
    assert not torch.equal(learnt, probabilities)  # from the step before
    step(model, optimizer, seed=9)
    assert optimizer.stats.skipped_steps == 1
    assert torch.equal(optimizer.probabilities, learnt)  # nothing is learnt from a skipped step
    assert not torch.equal(weights(model), before)


def test_with_lag_fifty_skipped_steps_in_a_row_are_an_error():
    model = nn.Linear(2, 2)
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1.0, lag=1))

    def poisoned() -> None:
        optimizer.zero_grad()
        (model(torch.ones(1, 2)).sum() * float("nan")).backward()
        optimizer.step()

    for _ in range(50):
        poisoned()
    with pytest.raises(js.errors.JointSparError, match="50 steps in a row"):
        poisoned()
