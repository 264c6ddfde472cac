"""The optimizers on a device: they follow the host, and a step neither waits, nor allocates, nor launches much."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import jointspar as js
from bench.gpu.launches import kernel_names
from device_support import DEVICE, keep_busy
from jointspar.device_arrays import Reading
from jointspar.errors import JointSparError
from support import bits

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

both_kinds = pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])


def make_model(device: str = DEVICE, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 3)
    ).to(device)


def forward(model: nn.Module, seed: int) -> torch.Tensor:
    device = next(model.parameters()).device
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(device)
    return model(x).square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, **arguments: float) -> None:
    optimizer.zero_grad()
    forward(model, seed).backward()
    optimizer.step(**arguments)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def sampling(**settings: Any) -> js.Sampling:
    room_to_learn = {} if settings.get("distribution") == "uniform" else {"p_min": 0.1}
    return js.Sampling(**({"budget": 0.5, "lag": 1} | room_to_learn | settings))


@both_kinds
@pytest.mark.parametrize("strategy", ["independent", "stratified", "shared"])
@pytest.mark.parametrize("distribution", ["norm", "bandit"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("arguments", [{}, {"max_norm": 0.1}], ids=["plain", "clipped"])
def test_50_steps_follow_the_host(kind: Any, strategy: str, distribution: str, lag: int, arguments: dict) -> None:
    settings = sampling(strategy=strategy, distribution=distribution, lag=lag)
    results = []
    for device in ("cpu", DEVICE):
        model = make_model(device)
        optimizer = kind(model.named_parameters(), sampling=settings)
        for seed in range(50):
            step(model, optimizer, seed, **arguments)
        results.append((weights(model).cpu(), optimizer.probabilities))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@both_kinds
@pytest.mark.parametrize("inactive", ["skip", "decay"])
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_inactive_layers_follow_the_host(kind: Any, inactive: str, budget: float) -> None:
    results = []
    for device in ("cpu", DEVICE):
        model = make_model(device)
        optimizer = kind(model.named_parameters(), inactive=inactive, sampling=sampling(budget=budget))
        for seed in range(50):
            step(model, optimizer, seed)
        results.append(weights(model).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def poison(model: nn.Module, value: float) -> None:
    grad = next(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    grad.flatten()[0] = value


@both_kinds
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_and_counted(kind: Any, lag: int, value: float) -> None:
    model = make_model()
    optimizer = kind(model.named_parameters(), sampling=sampling(lag=lag))
    for seed in range(3):
        step(model, optimizer, seed)
    before = weights(model)
    momenta = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    forward(model, 3).backward()
    poison(model, value)
    optimizer.step()
    assert torch.equal(weights(model), before)
    assert all(torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
               for parameter, momentum in zip(model.parameters(), momenta, strict=True))  # fmt: skip
    step(model, optimizer, 4)
    assert optimizer.stats.skipped_steps == 1
    assert not torch.equal(weights(model), before)


@both_kinds
@pytest.mark.parametrize("lag", [0, 1])
def test_a_grad_scaler_changes_nothing_but_skips_what_overflows(kind: Any, lag: int) -> None:
    settings = sampling(distribution="uniform", lag=lag)
    plain, scaled = make_model(), make_model()
    optimizers = [kind(model.named_parameters(), sampling=settings) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for seed in range(10):
        step(plain, optimizers[0], seed)
        optimizers[1].zero_grad()
        scaler.scale(forward(scaled, seed)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-5, atol=1e-6)
    before = weights(scaled)
    optimizers[1].zero_grad()
    scaler.scale(forward(scaled, 11)).backward()
    poison(scaled, math.inf)
    scaler.step(optimizers[1])
    scaler.update()
    assert torch.equal(weights(scaled), before)
    assert scaler.get_scale() == 2.0**9


def moved(value: Any, device: str) -> Any:
    """A copy of a state with all its tensors on one device, as torch.load's map_location makes it."""
    if isinstance(value, dict):
        return {name: moved(entry, device) for name, entry in value.items()}
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else copy.copy(value)


@both_kinds
@pytest.mark.parametrize("map_location", ["cpu", DEVICE])
def test_a_state_moves_from_the_host_to_a_device(kind: Any, map_location: str) -> None:
    models = [make_model("cpu"), make_model(DEVICE)]
    optimizers = [kind(model.named_parameters(), sampling=sampling()) for model in models]
    for seed in range(10):
        step(models[0], optimizers[0], seed)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(moved(optimizers[0].state_dict(), map_location))
    for seed in range(10, 20):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, seed)
    torch.testing.assert_close(weights(models[1]).cpu(), weights(models[0]), rtol=1e-5, atol=1e-6)


def equal_layers(num_tensors: int, size: int) -> nn.ParameterList:
    """Layers of one tensor each, so that every draw of a fixed number of them needs as much memory as another."""
    return nn.ParameterList([nn.Parameter(torch.randn(size, device=DEVICE)) for _ in range(num_tensors)])


def give_gradients(parameters: nn.ParameterList) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None


@both_kinds
def test_a_step_in_a_capture_is_refused_and_can_be_made_after_it(kind: Any) -> None:
    parameters = equal_layers(4, 1000)
    optimizer = kind(list(parameters.named_parameters()), sampling=sampling(grouping="tensor"))
    give_gradients(parameters)
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            parameters[0] + 1.0  # torch warns of an empty graph
            optimizer.step()

    with pytest.raises(JointSparError, match="cannot be captured"):
        capture()
    optimizer.step()


@both_kinds
@pytest.mark.parametrize("distribution", ["norm", "uniform"])
def test_with_lag_a_step_neither_waits_for_the_device_nor_calls_what_waits(kind: Any, distribution: str) -> None:
    parameters = equal_layers(40, 1000)
    settings = sampling(distribution=distribution, grouping="tensor")
    optimizer = kind(list(parameters.named_parameters()), sampling=settings)
    for turn in range(31):
        give_gradients(parameters)
        if turn == 30:  # pinned memory for steps in flight is allocated while the device is busy
            torch.cuda.synchronize()
            keep_busy(500)
        optimizer.step()
    give_gradients(parameters)
    torch.cuda.synchronize()
    keep_busy(500)
    before = torch.cuda.current_stream().record_event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not before.query()  # the kernel that was put there before the step is still at work


@both_kinds
def test_with_lag_the_first_steps_call_nothing_that_waits(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They draw layers of which no norm is known yet."""
    wait = Reading.wait

    def read(reading: Reading) -> Any:
        assert reading._event is None or reading._event.query()  # of which torch's debug mode says nothing
        return wait(reading)

    monkeypatch.setattr(Reading, "wait", read)
    parameters = equal_layers(40, 1000)
    optimizer = kind(list(parameters.named_parameters()), sampling=sampling(grouping="tensor"))
    for _ in range(5):
        give_gradients(parameters)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_without_lag_a_step_does_wait() -> None:
    """So the test above can fail."""
    parameters = equal_layers(40, 1000)
    optimizer = js.JointSparLARS(list(parameters.named_parameters()), sampling=sampling(lag=0, grouping="tensor"))
    for _ in range(2):
        give_gradients(parameters)
        torch.cuda.synchronize()
        keep_busy(500)
        before = torch.cuda.current_stream().record_event()
        optimizer.step()
    assert before.query()


@both_kinds
@pytest.mark.alone
def test_in_the_steady_state_a_step_allocates_nothing_that_stays(kind: Any) -> None:
    parameters = equal_layers(161, 10_000)
    optimizer = kind(list(parameters.named_parameters()), sampling=sampling(budget=80, grouping="tensor"))
    used = []
    for index in range(300):
        give_gradients(parameters)
        optimizer.step()
        if index in (100, 299):
            torch.cuda.synchronize()
            statistics = torch.cuda.memory_stats()
            names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "num_device_alloc")
            used.append([*(statistics[name] for name in names), torch.cuda.mem_get_info()[0]])
    assert used[0] == used[1]


@both_kinds
@pytest.mark.parametrize("inactive", ["skip", "decay"])
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_step_over_161_tensors_launches_at_most_six_kernels(kind: Any, inactive: str, budget: float) -> None:
    parameters = equal_layers(161, 64)
    settings = sampling(budget=budget, grouping="tensor")
    optimizer = kind(list(parameters.named_parameters()), inactive=inactive, sampling=settings)
    for _ in range(40):  # every tensor has been active: a norm that is not known yet takes another launch
        give_gradients(parameters)
        optimizer.step()
    give_gradients(parameters)
    names = kernel_names(optimizer.step)
    assert 1 <= len(names) <= 6, names


def read_late(is_waited_for: bool) -> int:
    """Of 1,000 vectors that a side stream writes late, how many reach the host as they are."""
    stream = torch.cuda.Stream()
    num_right = 0
    with torch.cuda.stream(stream):
        values = torch.zeros(1000, dtype=torch.float64, device=DEVICE)
        for index in range(1, 1001):
            keep_busy(0.5)
            values.fill_(float(index))
            reading = Reading(values)
            if not is_waited_for:
                reading._event = None
            num_right += bits(reading.wait().copy()) == bits(torch.full((1000,), float(index), dtype=torch.float64))
    stream.synchronize()
    return num_right


def test_1000_late_vectors_reach_the_host_as_they_are() -> None:
    assert read_late(is_waited_for=True) == 1000


def test_late_vectors_that_are_not_waited_for_arrive_wrong() -> None:
    """So the test above can fail."""
    assert read_late(is_waited_for=False) < 1000
