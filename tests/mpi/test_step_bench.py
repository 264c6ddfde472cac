"""Every method of `jointspar bench step` on 2 ranks: equal weights on both, and one answer from all dense methods."""

import json
import os

import numpy as np
import pytest
import torch
from torch.nn import functional

import interface_counters
from step.methods import LARS, METHODS, PHASES, Setting
from step.models import CASES, make_batch, make_model
from step.worker import check_replicas, connect, gather, main

pytestmark = pytest.mark.mpi
by_mpirun = pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)  # as the benchmark starts its ranks

LR, NUM_ITERATIONS = 0.05, 3
# Of a weight after three steps, relative to the norm of the tensor's change.
DENSE = {"plain": 1e-4, "jointspar_1.0": 1e-4, "ddp": 1e-4, "ddp_4mb": 1e-4, "ddp_bf16": 2e-2, "ddp_fp16": 2e-3}


def dense_lars(batches):
    """The change of each weight by LARS of the mean gradient of all ranks, float64 throughout."""
    model = make_model(CASES["lenet5"]).double()
    params = list(model.parameters())
    start, momenta = [param.detach().clone() for param in params], [torch.zeros_like(param) for param in params]
    for _ in range(NUM_ITERATIONS):
        model.zero_grad()
        for inputs, labels in batches:
            (functional.cross_entropy(model(inputs.double()), labels) / len(batches)).backward()
        with torch.no_grad():
            for w, u in zip(params, momenta, strict=True):
                step = w.grad
                if w.ndim >= 2:
                    norm, decay = w.norm(), LARS["weight_decay"]
                    rate = LARS["trust_coefficient"] * norm / (w.grad.norm() + decay * norm + LARS["eps"])
                    step = rate * (w.grad + decay * w)
                u.mul_(LARS["momentum"]).add_(step)
                w.sub_(LR * u)
    return [w.detach() - first for w, first in zip(params, start, strict=True)]


def run_every_method():
    ranks, case = connect("lo"), CASES["lenet5"]
    batch = make_batch(case, ranks.rank)
    expected = dense_lars([make_batch(case, rank) for rank in range(ranks.world_size)])
    for name, method in METHODS.items():
        setting = Setting(make_model(case), ranks, LR, seed=1)
        start = [param.detach().double() for param in setting.parameters]
        iteration = method.build(setting)
        for _ in range(NUM_ITERATIONS):
            phases = iteration.run(batch)
        assert tuple(phases) == PHASES
        assert min(phases.values()) > -0.1, f"{name}: {phases}"  # what one clock hands to another may round
        check_replicas(iteration, name)
        iteration.close()
        assert all(param.requires_grad for param in setting.parameters), name
        for param, first, change in zip(setting.parameters, start, expected, strict=True):
            actual = param.detach().double() - first
            if name in DENSE:
                assert (actual - change).norm() <= DENSE[name] * change.norm(), name
            else:
                assert actual.isfinite().all(), name
    assert {name for name, method in METHODS.items() if method.role in ("dense", "floor")} <= DENSE.keys()
    print(f"every method: rank {ranks.rank} is done", flush=True)


def differ():
    ranks = connect("lo")
    setting = Setting(make_model(CASES["lenet5"]), ranks, LR)
    iteration = METHODS["ddp"].build(setting)
    iteration.run(make_batch(CASES["lenet5"], ranks.rank))
    with torch.no_grad():
        setting.parameters[0].view(-1)[ranks.rank] += 1.0
    with pytest.raises(AssertionError, match="ddp: the ranks hold different weights"):
        check_replicas(iteration, "ddp")
    numbers = gather(np.array([ranks.rank + 0.5, -1.0]), ranks)
    assert numbers.tolist() == [[0.5, -1.0], [1.5, -1.0]]
    print(f"different weights: rank {ranks.rank} is done", flush=True)


def record_a_curve():
    main(["--loss-curve", "stratified_0.5", "--iterations", "3", "--dataset", "digits", "--out", os.environ["CURVE"]])


@by_mpirun
def test_every_method_leaves_equal_weights_and_dense_ones_are_lars(run_ranks):
    job = run_ranks(2, run_every_method, timeout=120)
    assert job.output.count("every method: rank") == 2


@by_mpirun
def test_different_weights_are_noticed(run_ranks):
    job = run_ranks(2, differ, timeout=120)
    assert job.output.count("different weights: rank") == 2


@by_mpirun
def test_loss_curve_has_a_loss_for_every_iteration(run_ranks, tmp_path):
    out = tmp_path / "curve.json"
    run_ranks(2, record_a_curve, timeout=120, env={"CURVE": str(out)})
    curve = json.loads(out.read_text())
    assert curve["method"] == "stratified_0.5"
    assert len(curve["losses"]) == 3
    assert all(0 < loss < 10 for loss in curve["losses"])


def test_interface_counts_bytes():
    assert interface_counters.sent_bytes("lo") >= 0
    with pytest.raises(ValueError, match="no interface 'nowhere'"):
        interface_counters.sent_bytes("nowhere")
