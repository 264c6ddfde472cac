"""Several ranks on one card: the exchanges of device buffers, staged or by an MPI that takes them, follow the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from device_support import DEVICE
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
