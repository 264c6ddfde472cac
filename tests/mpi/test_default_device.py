"""torch.set_default_device("cuda") moves nothing of the library's own: "meta" stands for it, without a card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import jointspar as js
from jobs import Finished
from jointspar.comm.transport import Transport
from support import launched

pytestmark = pytest.mark.mpi


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    return nn.Sequential(*layers)


def train(transport: Transport, exchange: str, folder: Path, device: str | None) -> torch.Tensor:
    """The weights after steps with every check on, of which some come after a checkpoint was loaded."""
    models = [make_model() for _ in range(2)]
    batches = torch.randn(2, 6, 12, 6, generator=torch.Generator().manual_seed(transport.rank))
    settings = {"comm": transport, "exchange": exchange, "check_every": 2}
    sampling = js.Sampling(budget=0.5, strategy="stratified", lag=int(exchange == "ring"))
    with nullcontext() if device is None else torch.device(device):
        for model, inputs in zip(models, batches, strict=True):
            overlap = exchange != "auto"
            optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling, overlap=overlap, **settings)
            js.sync_buffers(model, transport)
            if model is models[1]:
                js.checkpoint.load(folder, model=model, optimizer=optimizer)
            for x in optimizer.even_batches(inputs):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step(max_norm=1.0)
            js.checkpoint.save(folder, model=model, optimizer=optimizer)
    return torch.cat([parameter.detach().flatten() for parameter in models[1].parameters()])


def train_on_another_default_device() -> None:
    transport = launched(timeout=30)
    folder = Path(os.environ["FOLDER"])
    for exchange in ("allreduce", "ring", "two_shot", "auto"):
        plain, other = (
            train(transport, exchange, folder / f"{exchange}-{device}", device) for device in (None, "meta")
        )
        if exchange == "auto":  # which sum was chosen may differ
            torch.testing.assert_close(other, plain)
        else:
            assert torch.equal(other, plain), exchange
    transport.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_training_is_the_same_whatever_torchs_default_device(
    run_ranks: Callable[..., Finished], num_ranks: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(num_ranks, train_on_another_default_device, env={"FOLDER": folder})
