"""Arrays that a call on a device cannot take: an error that names the argument, and a device that works afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jointspar as js
from device_support import DEVICE
from jointspar import ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("backend")]

UPDATE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
LARS = {**UPDATE, "trust_coefficient": 1e-3, "eps": 1e-8}


def ones(size: int = 4, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def doubles(size: int = 4, device: str = DEVICE) -> torch.Tensor:
    return ones(size, torch.float64, device)


def lars(**replaced: Any) -> object:
    return ops.lars_update(**{"params": [ones()], "momenta": [ones()], "grads": [ones()], **LARS, **replaced})


def bandit(**replaced: Any) -> object:
    valid = {"probabilities": doubles() / 2, "squared_norms": doubles(), "active": ones(4, torch.bool)}
    return ops.update_probabilities(
        **{**valid, "gradient_bound": 1.0, "budget": 2.0, "p_min": 0.1, "bandit_lr": 0.1, **replaced}
    )


ON_THE_HOST: dict[str, Callable[[], object]] = {
    "grads": lambda: ops.pack_gradients([ones(), ones(device="cpu")], 1.0),
    "out": lambda: ops.pack_gradients([ones()], 1.0, out=ones(device="cpu")),
    "outs": lambda: ops.unpack_gradients(ones(8), [ones(), ones(device="cpu")]),
    "momenta": lambda: lars(momenta=[ones(device="cpu")]),
}
WRONG: dict[str, tuple[str, Callable[[], object]]] = {
    "strided gradient": ("grads", lambda: ops.pack_gradients([ones(8)[::2]], 1.0)),
    "expanded gradient": ("grads", lambda: ops.pack_gradients([ones(1).expand(4)], 1.0)),
    "int64 gradient": ("grads", lambda: ops.pack_gradients([ones(4, torch.int64)], 1.0)),
    "bool gradient": ("grads", lambda: ops.pack_gradients([ones(4, torch.bool)], 1.0)),
    "complex gradient": ("grads", lambda: ops.pack_gradients([ones(4, torch.complex64)], 1.0)),
    "buffer too small": ("out", lambda: ops.pack_gradients([ones()], 1.0, out=ones(3))),
    "targets overlap": ("outs", lambda: ops.unpack_gradients(ones(8), [memory := ones(6)[:4], memory])),
    "momentum of another dtype": ("momenta", lambda: lars(momenta=[doubles()])),
    "gradient of another size": ("grads", lambda: lars(grads=[ones(5)])),
    "float32 norms": ("param_norms", lambda: lars(param_norms=ones(1))),
    "too many norms": ("grad_norms", lambda: lars(grad_norms=doubles(2))),
    "float32 probabilities": ("probabilities", lambda: ops.sample_layers(ones(), seed=0, step=0)),
    "matrix of log weights": ("log_weights", lambda: ops.project_probabilities(
        doubles().reshape(2, 2), budget=2.0, p_min=0.1)),
    "float flags": ("active", lambda: bandit(active=doubles())),
    "too few norms": ("squared_norms", lambda: bandit(squared_norms=doubles(3))),
    "two bounds": ("gradient_bound", lambda: bandit(gradient_bound=doubles(2))),
    "out of another dtype": ("out", lambda: ops.project_probabilities(
        doubles(), budget=2.0, p_min=0.1, out=ones())),
    "out on the host": ("out", lambda: ops.project_probabilities(
        doubles(), budget=2.0, p_min=0.1, out=doubles(device="cpu"))),
}  # fmt: skip


def assert_the_device_works() -> None:
    torch.cuda.synchronize()
    assert ops.squared_norms([ones()]).tolist() == [4.0]


@pytest.mark.parametrize("argument", ON_THE_HOST)
def test_an_array_on_the_host_among_device_arrays_is_refused_by_name(argument: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"(?s){argument}.*(CPU|cpu|cuda)"):
        ON_THE_HOST[argument]()
    assert_the_device_works()


@pytest.mark.parametrize("label", WRONG)
def test_an_array_that_no_kernel_takes_is_refused_by_name(label: str) -> None:
    argument, call = WRONG[label]
    with pytest.raises((TypeError, ValueError), match=argument):
        call()
    assert_the_device_works()


def test_nothing_is_written_where_one_array_of_many_is_refused() -> None:
    params, momenta = ([ones(), ones()] for _ in range(2))
    with pytest.raises((TypeError, ValueError), match="grads"):
        lars(params=params, momenta=momenta, grads=[ones(), ones(4, torch.int32)])
    assert all(torch.equal(tensor, ones()) for tensor in (*params, *momenta))


def test_a_device_array_among_host_arrays_is_refused_by_name() -> None:
    with pytest.raises((TypeError, ValueError), match="grads"):
        ops.pack_gradients([ones(device="cpu"), ones()], 1.0)


def test_a_backend_for_the_host_says_that_it_does_not_serve_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOINTSPAR_BACKEND", "reference")
    with pytest.raises(RuntimeError, match="JOINTSPAR_BACKEND=reference"):
        ops.squared_norms([ones()])


def test_exchange_during_backward_is_for_parameters_on_the_host() -> None:
    with pytest.raises(ValueError, match="overlap: for parameters in host memory only"):
        js.JointSparLARS([torch.nn.Parameter(ones().reshape(2, 2))], lr=0.1, overlap=True)


def test_arrays_on_two_devices_are_refused_by_name() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises((TypeError, ValueError), match="grads"):
        ops.pack_gradients([ones(device="cuda:0"), ones(device="cuda:1")], 1.0)


def test_work_on_the_second_device_leaves_the_first_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    norms = ops.squared_norms([ones(device="cuda:1")])
    assert norms.device.index == 1
    assert norms.tolist() == [4.0]
    assert torch.cuda.current_device() == 0
