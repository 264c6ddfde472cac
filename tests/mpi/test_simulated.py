"""Simulated ranks give what the ranks of an MPI job give: every strategy, exchange and --method, on the same seeds."""

import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import jointspar as js
from jobs import find_launcher, run_on_ranks
from jointspar.training import plots
from jointspar.training.config import METHODS, TrainConfig
from jointspar.training.setup import make_optimizer
from jointspar.training.start import train as train_as_a_user

pytestmark = pytest.mark.mpi

NUM_STEPS = 30
OPTIMIZERS = {"sgd": (js.JointSparSGD, dict(lr=0.05)), "lars": (js.JointSparLARS, dict(lr=0.5, trust_coefficient=0.02))}
SAMPLINGS = {
    "dense": js.Sampling(budget=1.0, strategy="shared", distribution="uniform"),
    "independent": js.Sampling(strategy="independent", distribution="bandit", bandit_lr=0.3),
    "stratified": js.Sampling(strategy="stratified", p_min=0.1),
    "shared": js.Sampling(strategy="shared", draw="bernoulli", p_min=0.1),
    "stratified one step later": js.Sampling(strategy="stratified", p_min=0.1, lag=1),
}
WIRES = {"allreduce": None, "ring": "bfloat16", "two_shot": None}  # by exchange


def optimizer_of_api(kind, sampling, exchange, model):
    optimizer, settings = OPTIMIZERS[kind]
    given = dict(sampling=SAMPLINGS[sampling], exchange=exchange, wire_dtype=WIRES[exchange], check_every=10)
    return optimizer(model.named_parameters(), **given, **settings)


def optimizer_of_method(method, model):
    """As `jointspar train --method` makes it; which sums were chosen by time might differ in their last bits."""
    lr = 0.1 if METHODS[method].is_layerwise else 0.02
    exchange = None if METHODS[method].compressor else "ring"
    config = TrainConfig(out=Path("unused"), method=method, lr=lr, exchange=exchange, seed=5)
    return make_optimizer(config, model, js.comm.world(), steps_per_epoch=NUM_STEPS)


# Each sampling with each exchange, under one optimizer after the other.
CASES = {
    ", ".join(case): functools.partial(optimizer_of_api, *case)
    for kind, pair in zip(itertools.cycle(OPTIMIZERS), itertools.product(SAMPLINGS, WIRES))
    for case in [(kind, *pair)]
} | {f"--method {method}": functools.partial(optimizer_of_method, method) for method in METHODS}

RUNS = {method: {"method": method} for method in METHODS}
RUNS["resnet20"] = {"method": "jointspar-lars", "model": "resnet20", "strategy": "independent"}


def train(case):
    """Weights, probabilities and bytes sent after 30 steps on `js.comm.world()`: one float64 row."""
    torch.manual_seed(js.comm.world().rank)  # rank 0's weights go to all
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
    model.append(nn.Linear(8, 3))
    optimizer = CASES[case](model)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(12, 6)), torch.randint(0, 3, (12,))).backward()
        optimizer.step(max_norm=5.0)
    optimizer.finish()
    weights = torch.cat([parameter.detach().double().reshape(-1) for parameter in model.parameters()])
    counts = [optimizer.stats.total_sent_bytes, optimizer.stats.total_dense_bytes, optimizer.stats.skipped_steps]
    return np.concatenate([weights.numpy(), optimizer.probabilities.numpy(), counts])


def train_every_case():
    rows = [train(case) for case in CASES]
    np.save(Path(os.environ["RESULT"]) / f"{js.comm.world().rank}.npy", np.stack(rows))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_simulated_ranks_train_as_the_ranks_of_an_mpi_job(num_ranks, tmp_path):
    program = f"{__file__}:{train_every_case.__name__}"
    job = run_on_ranks(find_launcher("mpirun"), num_ranks, [program], 170, {"RESULT": str(tmp_path)})
    assert job.code == 0, job.output
    expected = np.stack([np.load(tmp_path / f"{rank}.npy") for rank in range(num_ranks)])
    found = np.stack(js.comm.run_simulated(num_ranks, lambda transport: np.stack([train(case) for case in CASES])))
    for number, case in enumerate(CASES):
        is_summed_by_mpi = "allreduce" in case or "powersgd" in case
        if num_ranks == 2 or not is_summed_by_mpi:  # MPI's order of three numbers is its own
            np.testing.assert_array_equal(found[:, number], expected[:, number], case)
        np.testing.assert_allclose(found[:, number], expected[:, number], rtol=1e-6, atol=1e-6, err_msg=case)


def train_every_run(workers=None):
    """`jointspar train` with each method: real pictures, convolutions, batch-norm statistics and their averages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_run", lambda *_: None)  # takes half a second
        for name, settings in RUNS.items():
            method = METHODS[settings["method"]]
            exchange = None if method.compressor else "ring"
            train_as_a_user(TrainConfig(
                out=Path(os.environ["RESULT"]) / name, max_steps=6, epochs=1, batch_size=32, threads=1, seed=3,
                lr=0.1 if method.is_layerwise else 0.02, exchange=exchange, simulate_workers=workers, **settings,
            ))  # fmt: skip


def test_simulated_runs_of_every_method_end_as_those_of_an_mpi_job(tmp_path, monkeypatch):
    program = f"{__file__}:{train_every_run.__name__}"
    job = run_on_ranks(find_launcher("mpirun"), 2, [program], 170, {"RESULT": str(tmp_path / "mpi")})
    assert job.code == 0, job.output
    monkeypatch.setenv("RESULT", str(tmp_path / "simulated"))
    train_every_run(workers=2)
    for name in RUNS:
        folders = [tmp_path / kind / name for kind in ("mpi", "simulated")]
        (expected, results), (found, other_results) = map(what_a_run_left, folders)
        assert results == other_results, name
        assert expected.keys() == found.keys()
        for tensor in expected:
            text = f"{name}, {tensor}"
            np.testing.assert_allclose(found[tensor], expected[tensor], rtol=1e-6, atol=1e-6, err_msg=text)


def what_a_run_left(folder):
    """Weights, momenta and buffers; accuracy and bytes."""
    (checkpoint,) = (folder / "checkpoint").iterdir()
    tensors = {**load_file(checkpoint / "shared.safetensors"), **load_file(checkpoint / "rank-1.safetensors")}
    summary = json.loads((folder / "summary.json").read_text())
    names = ("steps", "test_accuracy", "bytes_sent", "bytes_dense", "active_fraction", "skipped_steps", "exchange")
    kept = {name: tensor.double() for name, tensor in tensors.items() if name != "random_state"}
    return kept, {name: summary[name] for name in names}
