"""Simulated ranks give what the ranks of an MPI job give: every strategy, method and exchange, on the same seeds."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jobs import find_launcher, run_on_ranks

pytestmark = pytest.mark.mpi

NUM_STEPS = 30
METHODS = {"sgd": (js.JointSparSGD, dict(lr=0.05)), "lars": (js.JointSparLARS, dict(lr=0.5, trust_coefficient=0.02))}
SAMPLINGS = {
    "dense": js.Sampling(budget=1.0, strategy="shared", distribution="uniform"),
    "independent": js.Sampling(strategy="independent", distribution="bandit", bandit_lr=0.3),
    "stratified": js.Sampling(strategy="stratified"),
    "shared": js.Sampling(strategy="shared", draw="bernoulli"),
    "stratified one step later": js.Sampling(strategy="stratified", lag=1),
}
WIRES = {"allreduce": None, "ring": "bfloat16", "two_shot": None}  # by exchange
CASES = list(itertools.product(METHODS, SAMPLINGS, WIRES))


def train(method, sampling, exchange):
    """Weights, probabilities and bytes sent after 30 steps on `js.comm.world()`: one float64 row."""
    comm = js.comm.world()
    torch.manual_seed(comm.rank)  # rank 0's weights go to all
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
    model.append(nn.Linear(8, 3))
    kind, settings = METHODS[method]
    optimizer = kind(
        model.named_parameters(),
        sampling=SAMPLINGS[sampling],
        exchange=exchange,
        wire_dtype=WIRES[exchange],
        check_every=10,
        **settings,
    )
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(12, 6)), torch.randint(0, 3, (12,))).backward()
        optimizer.step(max_norm=5.0)
    optimizer.finish()
    weights = torch.cat([parameter.detach().double().reshape(-1) for parameter in model.parameters()])
    counts = [optimizer.stats.total_sent_bytes, optimizer.stats.total_dense_bytes, optimizer.stats.skipped_steps]
    return np.concatenate([weights.numpy(), optimizer.probabilities.numpy(), counts])


def train_every_case():
    rows = [train(*case) for case in CASES]
    np.save(Path(os.environ["RESULT"]) / f"{js.comm.world().rank}.npy", np.stack(rows))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_simulated_ranks_train_as_the_ranks_of_an_mpi_job(num_ranks, tmp_path):
    program = f"{__file__}:{train_every_case.__name__}"
    job = run_on_ranks(find_launcher("mpirun"), num_ranks, [program], 170, {"RESULT": str(tmp_path)})
    assert job.code == 0, job.output
    expected = np.stack([np.load(tmp_path / f"{rank}.npy") for rank in range(num_ranks)])
    found = np.stack(js.comm.run_simulated(num_ranks, lambda transport: np.stack([train(*case) for case in CASES])))
    for number, (method, sampling, exchange) in enumerate(CASES):
        case = f"{method}, {sampling}, {exchange}"
        if exchange != "allreduce" or num_ranks == 2:  # our own order of sums; two numbers have only one
            np.testing.assert_array_equal(found[:, number], expected[:, number], case)
        np.testing.assert_allclose(found[:, number], expected[:, number], rtol=1e-6, atol=1e-6, err_msg=case)
