"""Arguments and processes at the edges of what the operations promise, for every backend of the host."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import multiprocessing.queues
import platform
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from jointspar import ops

LARS = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3, "eps": 0.0}
pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def another_default_device() -> Iterator[None]:
    """As torch.set_default_device("cuda") does, without a card."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("another_default_device")
def test_host_arrays_stay_on_the_host_whatever_torchs_default_device() -> None:
    grad, param, momentum_buffer = (torch.ones(3, device="cpu") for _ in range(3))
    packed, _ = ops.pack_gradients([grad], 2.0)
    assert packed.device.type == "cpu" and packed.tolist() == [2.0, 2.0, 2.0]
    ops.sgd_update([param], [momentum_buffer], [None], lr=1.0, momentum=0.5, weight_decay=0.0)
    assert param.tolist() == [0.5, 0.5, 0.5]


def test_a_trust_ratio_beyond_float32_loses_no_weight() -> None:
    param, momentum_buffer = torch.tensor([1.0, 1.0]), torch.zeros(2)
    ops.lars_update([param], [momentum_buffer], [torch.tensor([0.0, 1e-43])], adapt=[True], **LARS)
    assert param[0] == 1.0 and bool(param.isfinite().all())


def test_infinite_norms_may_be_carried() -> None:
    """Weights of 16 bits overflow; what the update then says of them can be given to the next."""
    param, momentum_buffer = torch.full((3,), 60000.0).half(), torch.zeros(3)
    grad = torch.full((3,), -20000.0).half()
    measured = ops.lars_update([param], [momentum_buffer], [grad], adapt=[False], **LARS)
    assert measured.param_norms_after.tolist() == [float("inf")]
    ops.lars_update([param], [momentum_buffer], [grad], adapt=[False], param_norms=measured.param_norms_after, **LARS)


def test_an_infinite_gradient_norm_is_a_reason_to_skip() -> None:
    param, momentum_buffer = torch.ones(3), torch.ones(3)
    infinite = torch.tensor([float("inf")], dtype=torch.float64)
    ops.lars_update(
        [param], [momentum_buffer], [torch.ones(3)], adapt=[True], grad_norms=infinite, skip_nonfinite=True, **LARS
    )
    assert param.tolist() == momentum_buffer.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("is_lars", [False, True])
def test_autograd_learns_that_momenta_were_written(is_lars: bool) -> None:
    x, param, momentum_buffer = torch.ones(3, requires_grad=True), torch.ones(3), torch.ones(3)
    loss = (momentum_buffer * x).sum()
    if is_lars:
        ops.lars_update([param], [momentum_buffer], [torch.ones(3)], adapt=[True], **LARS)
    else:
        ops.sgd_update([param], [momentum_buffer], [torch.ones(3)], lr=1.0, momentum=0.5, weight_decay=0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("offset", [0, 2, 100_000])
def test_tensors_without_storage_are_refused(offset: int) -> None:
    given_back = torch.ones(offset + 8)[offset:]
    given_back.untyped_storage().resize_(0)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        ops.squared_norms([given_back])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_made_in_inference_mode_are_written(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        param, made = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
        momentum_buffer = torch.zeros(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ops.sgd_update([param], [momentum_buffer], [param.clone()], lr=0.5, momentum=0.5, weight_decay=0.0)
    assert param.tolist() == [0.5, 0.5, 0.5] and momentum_buffer.tolist() == [1.0, 1.0, 1.0]
    ops.unpack_gradients(torch.arange(6.0), [torch.zeros(3), made])
    assert made.tolist() == [3.0, 4.0, 5.0]


class AskedForStorage(torch.Tensor):
    """A tensor that says when its storage is looked into."""

    def untyped_storage(self) -> torch.UntypedStorage:
        raise AssertionError("asked for its storage")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for low memory as Linux on x86-64 is asked")
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_storages_of_tensors_at_low_addresses_are_not_looked_into() -> None:
    """There the heap of an interpreter lies that is not position-independent; the question costs more than the rest."""
    memory = low_memory(64)
    tensor = torch.frombuffer(memory, dtype=torch.float32)
    tensor.copy_(torch.arange(16.0))
    assert 0 < tensor.data_ptr() < 2**32
    parts = [tensor[:8].as_subclass(AskedForStorage), tensor[8:].as_subclass(AskedForStorage)]
    assert ops.squared_norms(parts).tolist() == [140.0, 1100.0]


def low_memory(size: int) -> ctypes.Array[ctypes.c_char]:
    """Memory below 2^32."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    low_32_bits = 0x40  # MAP_32BIT
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | low_32_bits
    arguments = (None, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, ctypes.c_long(0))
    address = libc.mmap(*arguments)
    assert address != ctypes.c_void_p(-1).value, "there is no memory so low"
    return (ctypes.c_char * size).from_address(address)


def test_misaligned_tensors_are_refused() -> None:
    misaligned = torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1)
    with pytest.raises(ValueError, match="is not aligned"):
        ops.squared_norms([misaligned])


def test_an_expanded_output_is_refused() -> None:
    out = torch.zeros(1, dtype=torch.bool).expand(4)
    with pytest.raises(ValueError, match="out: is expanded"):
        ops.sample_layers([0.5] * 4, seed=0, step=0, rank=0, out=out)


def test_indirect_buffers_are_refused() -> None:
    testbuffer = pytest.importorskip("_testbuffer", reason="this Python was built without its tests")
    indirect = testbuffer.ndarray([1.0, 2.0], shape=[2], format="d", flags=testbuffer.ND_PIL)
    with pytest.raises((TypeError, ValueError)):
        ops.squared_norms([indirect])


def norm_in_a_fork(results: multiprocessing.queues.Queue[float]) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)  # a child that waits for ever
    results.put(float(ops.squared_norms([np.ones(1_000_000)])[0]))  # torch's own threads would keep it waiting


@pytest.mark.parametrize("backend", ["native"], indirect=True)  # the others compute in torch's threads
def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert float(ops.squared_norms([np.ones(1_000_000)])[0]) == 1e6
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=norm_in_a_fork, args=(results,))
        child.start()
        child.join(timeout=30)
        child.kill()
        assert child.exitcode == 0
        assert results.get(timeout=5) == 1e6
        assert float(ops.squared_norms([np.ones(1_000_000)])[0]) == 1e6  # the parent goes on with its threads
    finally:
        torch.set_num_threads(num_threads)
