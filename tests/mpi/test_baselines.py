"""The baselines on several ranks: equal weights, true bytes, the sums of threads; and the command line."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import jointspar as js
import warm_python
from jobs import find_launcher, run_job
from jointspar.errors import CheckpointError, DesyncError
from jointspar.training.baselines import Gathered, TopK
from jointspar.training.config import COMPRESSION_FIELDS, COMPRESSORS, METHODS, TrainConfig
from jointspar.training.setup import make_compressed_exchange, make_optimizer
from late_transport import on_threads

pytestmark = pytest.mark.mpi


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 3))


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * (step % 2) + optimizer.comm.rank)
        inputs, labels = torch.randn(12, 20, generator=generator), torch.randint(0, 3, (12,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def gather(comm: Any, values: Any) -> np.ndarray:
    """Everybody's float64 values, [world_size, n]."""
    words = np.ascontiguousarray(np.asarray(values, dtype=np.float64)).view(np.int64)
    return comm.start_headers(words, what="test").wait().view(np.float64)


def config_of(method: str) -> TrainConfig:
    lr = 0.15 if METHODS[method].is_layerwise else 0.02
    ratio = 0.25 if METHODS[method].compressor in COMPRESSION_FIELDS["compression_ratio"] else None
    return TrainConfig(out=Path("unused"), method=method, lr=lr, compression_ratio=ratio)


def every_dense_method_trains_to_the_same_weights_on_all_ranks() -> None:
    comm = js.comm.world()
    for method in (name for name in METHODS if not METHODS[name].is_sparse):
        model = make_model()
        optimizer = make_optimizer(config_of(method), model, comm, steps_per_epoch=1)
        losses = train(model, optimizer, 0, 60)
        rows = gather(comm, weights(model).double().numpy())
        assert (rows == rows[0]).all(), method
        assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), (method, losses)
        stats = optimizer.stats
        assert stats.sent_bytes > 0 and stats.exchange == (METHODS[method].compressor or stats.exchange)


def exchanges_equal_those_among_threads_and_send_as_much() -> None:
    comm = js.comm.world()
    sizes = [parameter.numel() for parameter in make_model().parameters()]
    given = np.random.default_rng(0).standard_normal((3, comm.world_size, sum(sizes))).astype(np.float32)
    for compressor in COMPRESSORS:
        config = TrainConfig(out=Path("unused"), method=compressor, seed=5)
        among_threads = [make_compressed_exchange(compressor, config, make_model()) for _ in range(comm.world_size)]
        expected = torch.zeros(3, comm.world_size, sum(sizes))

        def run(transport: Any, exchanges: Any = among_threads, expected: torch.Tensor = expected) -> None:
            for number in range(3):
                packed = torch.tensor(given[number, transport.rank])
                exchanges[transport.rank](transport, packed, what="test")
                expected[number, transport.rank] = packed

        transports = on_threads(comm.world_size, run)
        exchange = make_compressed_exchange(compressor, config, make_model())
        sent_before = comm.bytes_sent
        for number in range(3):
            packed = torch.tensor(given[number, comm.rank])
            exchange(comm, packed, what="test")
            assert torch.equal(packed, expected[number, comm.rank]), compressor
        assert comm.bytes_sent - sent_before == transports[comm.rank].bytes_sent, compressor


def settings_that_differ_are_named() -> None:
    comm = js.comm.world()
    model = make_model()
    sizes = [parameter.numel() for parameter in model.parameters()]
    exchange = Gathered(TopK(0.1 if comm.rank else 0.2), sizes, seed=0)
    sampling = js.Sampling(budget=1.0, strategy="shared")
    with pytest.raises(DesyncError, match="setting 'exchange' differs"):
        js.JointSparSGD(model.named_parameters(), sampling=sampling, exchange=exchange)


def checkpoints_resume_bit_for_bit_and_need_as_many_ranks() -> None:
    comm = js.comm.world()
    job = int(gather(comm, [time.time()])[0, 0] * 1e3)
    for method in ("topk", "powersgd", "qsgd"):
        folder = Path(tempfile.gettempdir()) / f"jointspar-baselines-{job}-{method}"
        model, other, alone = make_model(), make_model(), make_model()
        optimizer = make_optimizer(config_of(method), model, comm, steps_per_epoch=1)
        train(model, optimizer, 0, 5)
        js.checkpoint.save(folder, model=model, optimizer=optimizer)
        train(model, optimizer, 5, 10)
        resumed = make_optimizer(config_of(method), other, comm, steps_per_epoch=1)
        js.checkpoint.load(folder, model=other, optimizer=resumed)
        train(other, resumed, 5, 10)
        assert torch.equal(weights(model), weights(other)), method
        single = make_optimizer(config_of(method), alone, js.comm.local(), steps_per_epoch=1)
        if method == "qsgd":  # nothing of each rank's own
            js.checkpoint.load(folder, model=alone, optimizer=single)
        else:
            with pytest.warns(UserWarning, match="ranks"), pytest.raises(CheckpointError, match="was saved by"):
                js.checkpoint.load(folder, model=alone, optimizer=single)
        gather(comm, [0.0])  # all have read it
        if comm.rank == 0:
            shutil.rmtree(folder)


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpirun", 3), ("torchrun", 2)], indirect=["launcher"])
def test_every_method_leaves_equal_weights_on_all_ranks(run_ranks, num_ranks) -> None:
    run_ranks(num_ranks, every_dense_method_trains_to_the_same_weights_on_all_ranks, timeout=170)


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpirun", 2), ("torchrun", 3)], indirect=["launcher"])
def test_exchanges_equal_those_among_threads(run_ranks, num_ranks) -> None:
    run_ranks(num_ranks, exchanges_equal_those_among_threads_and_send_as_much)


@pytest.mark.parametrize("launcher", ["torchrun"], indirect=True)
def test_other_settings_are_a_desync_error(run_ranks) -> None:
    run_ranks(2, settings_that_differ_are_named)


@pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)
def test_checkpoints_resume(run_ranks) -> None:
    run_ranks(2, checkpoints_resume_bit_for_bit_and_need_as_many_ranks)


def test_the_command_line_trains_and_resumes_with_topk(tmp_path) -> None:
    flags = ["--method", "topk", "--compression-ratio", "0.05", "--epochs", "2", "--base-lr", "0.1", "--threads", "1"]

    def run(folder: str, *more: str) -> None:
        command = warm_python.command("-m", "jointspar", "train", "--out", str(tmp_path / folder), *flags, *more)
        job = run_job([*find_launcher("mpirun"), "2", *command], 100)
        assert job.code == 0, job.output

    run("whole", "--max-steps", "9")
    run("parts", "--max-steps", "4")
    run("parts", "--max-steps", "9", "--resume")
    newest = [max((tmp_path / folder / "checkpoint").glob("step-*")) for folder in ("whole", "parts")]
    for name in ("shared", "rank-0", "rank-1"):
        whole, parts = (load_file(folder / f"{name}.safetensors") for folder in newest)
        assert whole.keys() == parts.keys()
        different = {key for key in whole if not whole[key].equal(parts[key])}
        assert different <= {"random_state"}, name  # torch's own, which `jointspar train` neither seeds nor uses
    memories = [load_file(newest[0] / f"rank-{rank}.safetensors")["exchange.memory"] for rank in (0, 1)]
    assert not memories[0].equal(memories[1])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    # headers of 16 words and more travel too
    assert summary["method"] == "topk" and 0 < summary["bytes_sent"] < 0.2 * summary["bytes_dense"]
