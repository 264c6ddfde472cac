"""Several ranks on one card: the exchanges of device buffers, staged or by an MPI that takes them, follow the host."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from device_support import DEVICE, keep_busy
from jobs import find_launcher, run_on_ranks
from jointspar.comm.hashing import stable_hash
from jointspar.comm.transport import Transport
from support import launched

pytestmark = [pytest.mark.cuda, pytest.mark.mpi]


def train(transport: Transport, device: str, exchange: str, lag: int) -> torch.Tensor:
    """The weights after 20 steps on batches of this rank's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(device)
    sampling = js.Sampling(budget=0.5, strategy="stratified", distribution="uniform", lag=lag)
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling, comm=transport, exchange=exchange)
    for step in range(20):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * transport.rank + step)).to(device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])


def follow_the_host() -> None:
    transport = launched(timeout=60)
    for exchange in ("allreduce", "ring", "two_shot", "auto"):
        for lag in (0, 1):
            expected, found = (train(transport, device, exchange, lag) for device in ("cpu", DEVICE))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=exchange)
            digest = np.array([stable_hash(found)], dtype=np.int64)
            rows = transport.start_headers(digest, what="digest of the weights").wait()
            assert (rows == rows[0]).all(), exchange
    transport.close()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_ranks_that_share_a_card_follow_the_host(launcher: str, num_ranks: int) -> None:
    job = run_on_ranks(find_launcher(launcher), num_ranks, [f"{Path(__file__)}:follow_the_host"], 120, None)
    assert job.code == 0, job.output


NOT_CUDA_AWARE = "this MPI does not take CUDA memory"


def num_right_of_1000(transport: Transport) -> int:
    """Sums of device memory on a side stream, each of values that a kernel writes late."""
    num_right = torch.zeros((), dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        packed = torch.zeros(100_003, device=DEVICE)
        for index in range(1, 1001):
            keep_busy(0.5)
            packed.fill_(float(index * (transport.rank + 1)))
            transport.allreduce(packed, what="a step")
            num_right += (packed == float(index * sum(range(1, transport.world_size + 1)))).all()
    stream.synchronize()
    return int(num_right)


def sum_device_memory_1000_times() -> None:
    transport = launched(timeout=60)
    if not transport.agree_on_cuda():
        print(NOT_CUDA_AWARE)
    else:
        assert num_right_of_1000(transport) == 1000
        module = importlib.import_module("jointspar.comm.mpi")  # the package has a function of this name
        module.wait_for_stream = lambda *arguments, **settings: None
        assert num_right_of_1000(transport) < 1000, "without waiting for the stream the sums are right, too"
    transport.close()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_mpi_that_takes_device_memory_sums_what_was_written_late(num_ranks: int) -> None:
    program = f"{Path(__file__)}:sum_device_memory_1000_times"
    job = run_on_ranks(find_launcher("mpirun"), num_ranks, [program], 120, None)
    assert job.code == 0, job.output
    if NOT_CUDA_AWARE in job.output:
        pytest.skip(NOT_CUDA_AWARE)
