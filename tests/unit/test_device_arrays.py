"""Streams that arrays name: in order with torch's, shown with stand-ins for CUDA's streams."""

from types import SimpleNamespace

import pytest
import torch

from jointspar import arguments
from jointspar.backends.on_device import OnDevice
from jointspar.device_arrays import Place, named_stream


class Interface:
    def __init__(self, **entries):
        self.__cuda_array_interface__ = {"version": 3} | entries


@pytest.fixture
def diary(monkeypatch):
    """What happened, in order; "torch" is torch's current stream, 7 the one that the array names."""
    entries = []

    def stream(name):
        return SimpleNamespace(
            name=name, cuda_stream=0, wait_stream=lambda other: entries.append(f"{name} waits for {other.name}")
        )

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream("torch"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream("default"))

    def external_stream(handle, device):
        assert handle != 1  # torch refuses the legacy default stream by its handle
        return stream(handle)

    monkeypatch.setattr(torch.cuda, "ExternalStream", external_stream)
    monkeypatch.setattr(
        "jointspar.backends.on_device.empty", lambda place, size, dtype: entries.append("new result") or "result"
    )
    return entries


def test_a_named_stream_is_that_of_the_interface_and_no_tensor_has_one():
    assert named_stream(Interface(stream=7)) == 7
    assert [named_stream(array) for array in (Interface(stream=None), Interface(), torch.ones(1), None)] == [None] * 4


@pytest.mark.parametrize(
    ("array", "handle", "name"),
    [
        (Interface(stream=7), 7, 7),
        (Interface(stream=2), 2, 2),
        (Interface(stream=1), 1, "default"),
        (Interface(), 0, ""),
    ],
)
def test_work_on_a_named_stream_comes_between_the_work_of_torch(array, handle, name, diary):
    def squared_norms(grads, sizes, norms, *, device, stream):
        diary.append(f"launch on {stream}")

    served = OnDevice(SimpleNamespace(squared_norms=squared_norms), Place(0, "torch"), array)
    assert served.squared_norms([array], None) == "result"
    launch = [f"launch on {handle}"]
    if name:
        launch = [f"{name} waits for torch", *launch, f"torch waits for {name}"]
    assert diary == ["new result", *launch]


def test_a_result_on_a_device_is_written_into_a_parameter():
    out = torch.nn.Parameter(torch.zeros(3))
    assert arguments.copy_to("out", out, torch.ones(3)) is out  # values that are no host array: as on a device
    assert out.tolist() == [1.0, 1.0, 1.0] and out.grad_fn is None and out.requires_grad
