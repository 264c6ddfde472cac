"""The optimizers on several ranks: against one rank, against the formulas, and when ranks differ."""

import copy
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jobs import find_launcher, run_on_ranks
from jointspar.errors import CheckpointError, DesyncError
from jointspar.step.exchange import Costs

pytestmark = pytest.mark.mpi


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(
        dtype
    )


def batch_of(step, rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(12, 6, generator=generator, dtype=torch.float64).to(dtype), torch.randint(
        0, 3, (12,), generator=generator
    )


def backward(model, batch):
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def weights(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def gather(comm, values):
    """Everybody's float64 values, [world_size, n]."""
    words = np.ascontiguousarray(np.asarray(values, dtype=np.float64)).view(np.int64)
    return comm.start_headers(words, what="test").wait().view(np.float64)


def assert_same_on_all_ranks(comm, tensor):
    rows = gather(comm, tensor.double().numpy())
    assert (rows == rows[0]).all()


def many_ranks_equal_one_rank_on_the_joined_batch():
    comm = js.comm.world()
    cases = (
        (js.JointSparLARS, dict(lr=0.5, trust_coefficient=0.02), ("allreduce", "ring", "two_shot")),
        (js.JointSparSGD, dict(lr=0.1), ("ring",)),
    )
    for kind, settings, exchanges in cases:
        for exchange in exchanges:
            model, twin = make_model(seed=comm.rank), make_model(seed=0)  # rank 0's weights go to all
            sampling = js.Sampling(budget=1.0)
            optimizer = kind(model.named_parameters(), sampling=sampling, exchange=exchange, **settings)
            alone = kind(twin.named_parameters(), sampling=sampling, comm=js.comm.local(), **settings)
            for step in range(200):
                optimizer.zero_grad()
                backward(model, batch_of(step, comm.rank))
                optimizer.step()
                joined = [
                    torch.cat(parts) for parts in zip(*(batch_of(step, r) for r in range(comm.world_size)), strict=True)
                ]
                alone.zero_grad()
                backward(twin, joined)
                alone.step()
            assert (weights(model) - weights(twin)).norm() <= 1e-5 * weights(twin).norm()
            assert_same_on_all_ranks(comm, weights(model))


def dense_grads(model, step, size):
    """Every rank's dense gradients by name, computed here."""
    grads = []
    for rank in range(size):
        twin = copy.deepcopy(model).requires_grad_(True)
        twin.zero_grad()
        backward(twin, batch_of(step, rank, torch.float64))
        grads.append({name: parameter.grad for name, parameter in twin.named_parameters()})
    return grads


def check_layer(strategy, found, dense, name, active, probabilities):
    """One tensor's mean_grad against the table of strategies; active and probabilities are [world_size]."""
    size, count = len(active), active.sum()
    assert (name in found) == (count > 0)
    if count == 0:
        return
    expected = torch.zeros_like(found[name])
    for rank, p in enumerate(probabilities):
        weight = 1 / (count * min(1, size * p)) if strategy == "stratified" else 1 / (size * p)
        expected += active[rank] * weight * dense[rank][name]
    torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)


def check_strategy(comm, strategy, draw, exchange):
    model, size = make_model(torch.float64), comm.world_size
    sampling = js.Sampling(budget=0.5, strategy=strategy, draw=draw, distribution="bandit", bandit_lr=0.3)
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.05, sampling=sampling, exchange=exchange)
    for step in range(12):
        active = gather(comm, optimizer.active.double().numpy())
        probabilities = gather(comm, optimizer.probabilities.numpy())
        dense = dense_grads(model, step, size)
        optimizer.zero_grad()
        backward(model, batch_of(step, comm.rank, torch.float64))
        optimizer.synchronize()
        found = dict(optimizer.mean_grads)
        layer_of = {layer.name: index for index, layer in enumerate(optimizer.layers)}
        for name in dense[0]:
            index = layer_of.get(name.rpartition(".")[0])
            if index is None:  # the norm: always active
                check_layer("shared", found, dense, name, np.ones(size), np.ones(size))
            else:
                check_layer(strategy, found, dense, name, active[:, index], probabilities[:, index])
        optimizer.step()
        assert_same_on_all_ranks(comm, weights(model))
        if strategy != "independent":
            assert_same_on_all_ranks(comm, optimizer.probabilities)
        if strategy == "shared":
            assert_same_on_all_ranks(comm, optimizer.active)


def mean_grad_is_what_the_strategy_says():
    comm = js.comm.world()
    for strategy in ("independent", "stratified", "shared"):
        for draw in ("systematic", "bernoulli"):
            check_strategy(comm, strategy, draw, "auto")
        check_strategy(comm, strategy, "systematic", "two_shot")


def a_nan_on_one_rank_is_skipped_on_all():
    comm = js.comm.world()
    for exchange, wire in (("allreduce", None), ("ring", None), ("two_shot", "bfloat16")):
        model = make_model()
        sampling = js.Sampling(p_min=0.1)
        optimizer = js.JointSparLARS(model.named_parameters(), exchange=exchange, wire_dtype=wire, sampling=sampling)
        for step in range(6):
            before = weights(model).clone()
            probabilities = optimizer.probabilities
            optimizer.zero_grad()
            backward(model, batch_of(step, comm.rank))
            if step == 3 and comm.rank == comm.world_size - 1:
                model[2].weight.grad[0] = float("nan")
            optimizer.step()
            assert torch.equal(before, weights(model)) == (step == 3)
            assert torch.equal(probabilities, optimizer.probabilities) or step != 3
            assert_same_on_all_ranks(comm, weights(model))
        assert optimizer.stats.skipped_steps == 1


def found_inf_on_one_rank_is_skipped_on_all_and_scales_may_differ():
    comm = js.comm.world()
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling())
    plain = js.JointSparLARS(twin.named_parameters(), sampling=js.Sampling())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + comm.rank))
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(
            nn.functional.cross_entropy(*(lambda b: (model(b[0]), b[1]))(batch_of(step, comm.rank, torch.float64)))
        ).backward()
        plain.zero_grad()
        backward(twin, batch_of(step, comm.rank, torch.float64))
        if step == 5:
            for net, rank in ((model, 0), (twin, comm.world_size - 1)):
                if comm.rank == rank:
                    net[2].weight.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-12, atol=1e-14)
        assert_same_on_all_ranks(comm, weights(model))
    assert optimizer.stats.skipped_steps == plain.stats.skipped_steps == 1
    assert scaler.get_scale() == 2.0 ** (3 + comm.rank - (comm.rank == 0))


def a_short_wire_trains_to_the_same_weights_on_all_ranks():
    comm = js.comm.world()
    for wire in ("bfloat16", "float16"):
        model = make_model()
        optimizer = js.JointSparLARS(model.named_parameters(), wire_dtype=wire, trust_coefficient=0.05, lr=0.1)
        losses = []
        for step in range(100):
            optimizer.zero_grad()
            losses.append(backward(model, batch_of(step % 2, comm.rank)).item())
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]
        assert_same_on_all_ranks(comm, weights(model))
        assert 0 < optimizer.stats.total_sent_bytes < optimizer.stats.steps * (2 * weights(model).numel() + 2000)


def check_rounding(comm, exchange, wire):
    """mean_grad against the float64 sum of what the ranks computed: one rounding to pack, one at each addition."""
    model = make_model()
    sampling = js.Sampling(budget=0.5)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=sampling, wire_dtype=wire, exchange=exchange)
    roundings = comm.world_size * torch.finfo(getattr(torch, wire)).eps / 2
    layer_of = {layer.name: index for index, layer in enumerate(optimizer.layers)}
    for step in range(4):
        active = gather(comm, optimizer.active.double().numpy())
        count, p = active.sum(axis=0), optimizer.probabilities.numpy()
        optimizer.zero_grad()
        backward(model, batch_of(step, comm.rank))
        optimizer.synchronize()
        for name, parameter in model.named_parameters():
            index = layer_of.get(name.rpartition(".")[0])
            computes = index is None or active[comm.rank, index]
            own = parameter.grad if computes else torch.zeros_like(parameter)
            rows = gather(comm, own.double().reshape(-1).numpy())
            if index is None or count[index]:
                weight = (
                    1 / comm.world_size if index is None else 1 / (count[index] * min(1, comm.world_size * p[index]))
                )
                error = np.abs(optimizer.mean_grads[name].double().reshape(-1).numpy() - (weight * rows).sum(axis=0))
                smallest = comm.world_size * 2.0**-25  # half a step of float16 below its normal range
                assert (error <= roundings / (1 - roundings) * weight * np.abs(rows).sum(axis=0) + smallest).all()
        optimizer.step()
        assert optimizer.stats.exchange == exchange


def a_short_wire_rounds_no_more_than_it_must():
    comm = js.comm.world()
    for wire in ("bfloat16", "float16"):
        for exchange in ("allreduce", "ring", "two_shot"):
            if exchange != "allreduce" or comm.can_allreduce(getattr(torch, wire)):
                check_rounding(comm, exchange, wire)


def two_shot_sends_less_than_the_ring():
    comm = js.comm.world()
    sent = {}
    for exchange in ("ring", "two_shot"):
        model = make_model()
        sampling = js.Sampling(budget=0.5, strategy="independent")
        optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling, exchange=exchange)
        for step in range(20):
            optimizer.zero_grad()
            backward(model, batch_of(step, comm.rank))
            optimizer.step()
        stats = optimizer.stats
        sent[exchange] = gather(comm, [stats.total_sent_bytes, stats.total_dense_bytes]).sum(axis=0)
    assert sent["two_shot"][0] < sent["ring"][0]
    assert sent["two_shot"][1] == sent["ring"][1]


def one_rank_alone_may_look_at_mean_grads():
    comm = js.comm.world()
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    for step in range(3):
        optimizer.zero_grad()
        backward(model, batch_of(step, comm.rank))
        optimizer.synchronize()
        if comm.rank == 0:
            assert optimizer.mean_grads
        optimizer.step()
    assert_same_on_all_ranks(comm, weights(model))


def buffers_are_averaged():
    comm = js.comm.world()
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(float(comm.rank))
    js.sync_buffers(model)
    assert torch.equal(model[1].running_mean, torch.full((3,), (comm.world_size - 1) / 2))
    optimizer = js.JointSparLARS(model.named_parameters())
    model[1].running_var.fill_(2.0 * comm.rank)
    js.sync_buffers(model)
    assert torch.equal(model[1].running_var, torch.full((3,), comm.world_size - 1.0))
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()


def checkpoints_resume_bit_for_bit():
    comm = js.comm.world()
    directory = Path(tempfile.gettempdir()) / f"jointspar-{np.uint64(hash_of_job())}"
    for strategy in ("independent", "stratified"):
        sampling = js.Sampling(strategy=strategy, distribution="bandit", bandit_lr=0.3)
        model = make_model()
        optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling)

        def train(model, optimizer, first, last):
            for step in range(first, last):
                optimizer.zero_grad()
                backward(model, batch_of(step, comm.rank))
                optimizer.step()

        train(model, optimizer, 0, 5)
        folder = directory / strategy
        js.checkpoint.save(folder, model=model, optimizer=optimizer, extra={"next": 5})
        train(model, optimizer, 5, 10)
        other = make_model(seed=5)
        resumed = js.JointSparLARS(other.named_parameters(), sampling=sampling)
        assert js.checkpoint.load(folder, model=other, optimizer=resumed) == {"next": 5}
        assert resumed.exchange_costs == optimizer.exchange_costs
        train(other, resumed, 5, 10)
        assert torch.equal(weights(model), weights(other))
        assert torch.equal(optimizer.probabilities, resumed.probabilities)
        alone = make_model()
        single = js.JointSparLARS(alone.named_parameters(), sampling=sampling, comm=js.comm.local())
        if strategy == "independent":
            with pytest.warns(UserWarning, match="ranks"), pytest.raises(CheckpointError, match="was saved by"):
                js.checkpoint.load(folder, model=alone, optimizer=single)
        else:
            js.checkpoint.load(folder, model=alone, optimizer=single)


def hash_of_job():
    """A number that all ranks of this job share and no other job has."""
    comm = js.comm.world()
    return int(gather(comm, [time.time()])[0, 0] * 1e3)


def a_resumed_run_chooses_as_the_first_one_did():
    """Though its own measurement would have it choose otherwise."""
    comm = js.comm.world()
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    costs = optimizer._pipeline.chooser.costs
    assert {"allreduce", "ring", "two_shot"} <= costs.seconds.keys()
    for preferred in costs.seconds:
        chosen = Costs((1000,), {name: (1.0 + 1000.0 * (name != preferred),) for name in costs.seconds})
        optimizer._pipeline.chooser.costs = chosen
        resumed = js.JointSparLARS(model.named_parameters())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        backward(model, batch_of(0, comm.rank))
        resumed.step()
        assert resumed.stats.exchange == preferred
        assert resumed.exchange_costs == chosen


def everything_that_must_hold():
    a_resumed_run_chooses_as_the_first_one_did()
    a_short_wire_rounds_no_more_than_it_must()
    many_ranks_equal_one_rank_on_the_joined_batch()
    mean_grad_is_what_the_strategy_says()
    a_nan_on_one_rank_is_skipped_on_all()
    found_inf_on_one_rank_is_skipped_on_all_and_scales_may_differ()
    a_short_wire_trains_to_the_same_weights_on_all_ranks()
    two_shot_sends_less_than_the_ring()
    one_rank_alone_may_look_at_mean_grads()
    buffers_are_averaged()
    checkpoints_resume_bit_for_bit()


def sums_are_right():
    many_ranks_equal_one_rank_on_the_joined_batch()
    mean_grad_is_what_the_strategy_says()
    a_short_wire_rounds_no_more_than_it_must()


def test_two_ranks_compute_what_the_formulas_say_and_stay_together(run_ranks, tmp_path):
    run_ranks(2, everything_that_must_hold, timeout=200, env={"TMPDIR": str(tmp_path)})


@pytest.mark.parametrize(("launcher", "num_ranks"), [("mpirun", 3), ("torchrun", 1)], indirect=["launcher"])
def test_sums_are_right(run_ranks, num_ranks):
    run_ranks(num_ranks, sums_are_right, timeout=200)


def train_and_keep_the_weights():
    comm = js.comm.world()
    for exchange in ("ring", "allreduce"):
        model = make_model()
        optimizer = js.JointSparLARS(model.named_parameters(), exchange=exchange, lr=0.5, trust_coefficient=0.02)
        for step in range(30):
            optimizer.zero_grad()
            backward(model, batch_of(step, comm.rank))
            optimizer.step()
        np.save(Path(os.environ["RESULT"]) / f"{exchange}-{comm.rank}.npy", weights(model).numpy())


@pytest.mark.parametrize("launcher", ["mpirun"], indirect=True)
def test_training_under_torchrun_gives_what_mpirun_gives(launcher, tmp_path):
    num_ranks = 3
    results = {}
    for name in ("mpirun", "torchrun"):
        program = f"{__file__}:{train_and_keep_the_weights.__name__}"
        (tmp_path / name).mkdir()
        job = run_on_ranks(find_launcher(name), num_ranks, [program], 100, {"RESULT": str(tmp_path / name)})
        assert job.code == 0, job.output
        results[name] = {path.name: np.load(path) for path in (tmp_path / name).iterdir()}
    assert len(results["mpirun"]) == 2 * num_ranks
    for name, expected in results["mpirun"].items():
        found = results["torchrun"][name]
        if name.startswith("ring"):  # our own order of sums
            assert (found == expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _expect_desync(start):
    """This rank sees the error, and within 5 seconds of the time when both were there."""
    gather(js.comm.world(), [0.0])
    began = time.time()
    with pytest.raises(DesyncError) as caught:
        start()
    assert time.time() - began < 5
    print("DESYNC", caught.value, flush=True)


def seeds_differ():
    rank = js.comm.world().rank
    _expect_desync(lambda: js.JointSparLARS(make_model().named_parameters(), sampling=js.Sampling(seed=rank)))


def budgets_differ():
    rank = js.comm.world().rank
    _expect_desync(lambda: js.JointSparLARS(make_model().named_parameters(), sampling=js.Sampling(budget=1 + rank)))


def layouts_differ():
    rank = js.comm.world().rank
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4 + rank))
    _expect_desync(lambda: js.JointSparLARS(model.named_parameters()))


def memory_orders_differ():
    rank = js.comm.world().rank
    model = nn.Conv2d(3, 4, 3)
    model = model.to(memory_format=torch.channels_last) if rank else model
    _expect_desync(lambda: js.JointSparLARS(model.named_parameters()))


def optimizers_differ():
    rank = js.comm.world().rank
    kind = js.JointSparSGD if rank else js.JointSparLARS
    _expect_desync(lambda: kind(make_model().named_parameters()))


def learning_rates_differ():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), lr=0.1 * (1 + rank))
    backward(model, batch_of(0, rank))
    _expect_desync(optimizer.step)


def nesterov_differs():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), nesterov=rank == 1)
    backward(model, batch_of(0, rank))
    _expect_desync(optimizer.step)


def groups_differ():
    rank = js.comm.world().rank
    model = make_model()
    named = list(model.named_parameters())
    cut = 2 + rank
    optimizer = js.JointSparLARS([{"params": named[:cut]}, {"params": named[cut:], "lr": 0.3}])
    backward(model, batch_of(0, rank))
    _expect_desync(optimizer.step)


def clipping_differs():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    backward(model, batch_of(0, rank))
    _expect_desync(lambda: optimizer.synchronize(max_norm=1.0 + rank))


def one_freezes_a_layer():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1.0))
    backward(model, batch_of(0, rank))
    if rank == 1:
        model[0].requires_grad_(False)
    _expect_desync(optimizer.step)


def states_remember_other_measurements():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    state = copy.deepcopy(optimizer.state_dict())
    state["jointspar"]["exchange"]["ring"][0] += rank
    _expect_desync(lambda: optimizer.load_state_dict(state))


def states_carry_other_norms():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    state = copy.deepcopy(optimizer.state_dict())
    state["jointspar"]["update"]["steps"] += rank
    _expect_desync(lambda: optimizer.load_state_dict(state))


def probabilities_differ():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(p_min=0.1))

    def two_steps():
        for step in range(2):
            if rank == 1:
                optimizer._pipeline.distribution.norm_ema[0] += 1.0  # a memory error, say
                optimizer._pipeline.distribution.norm_count[0] += 1
            optimizer.zero_grad()
            backward(model, batch_of(step, rank))
            optimizer.step()

    _expect_desync(two_steps)


def shared_draws_differ():
    rank = js.comm.world().rank
    model = make_model()
    sampling = js.Sampling(strategy="shared", distribution="uniform")
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling)

    def two_steps():
        for step in range(2):
            with pytest.MonkeyPatch.context() as patch:
                if rank == 1:  # a memory error, say
                    patch.setattr("jointspar.pipeline.draw_layers", lambda p, *_, **__: np.ones(p.size, dtype=bool))
                optimizer.zero_grad()
                backward(model, batch_of(step, rank))
                optimizer.step()

    _expect_desync(two_steps)


def one_saves_and_one_steps():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    backward(model, batch_of(0, rank))
    save = lambda: js.checkpoint.save(tempfile.mkdtemp(), model=model, optimizer=optimizer)  # noqa: E731
    _expect_desync(save if rank else optimizer.step)


def loaders_have_ten_and_thirteen_batches():
    rank = js.comm.world().rank
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())

    def run():
        for step in range(10 + 3 * rank):
            optimizer.zero_grad()
            backward(model, batch_of(step, rank))
            optimizer.step()
        optimizer.finish()

    _expect_desync(run)


DIFFERENCES = {
    seeds_differ: "setting 'seed' differs",
    budgets_differ: "setting 'budget' differs",
    layouts_differ: "layer 1 '1' differs",
    memory_orders_differ: "layer 0",
    optimizers_differ: "setting 'optimizer' differs",
    learning_rates_differ: "hyperparameters, or which parameters are frozen differ",
    nesterov_differs: "hyperparameters, or which parameters are frozen differ",
    groups_differ: "hyperparameters, or which parameters are frozen differ",
    clipping_differs: "hyperparameters, or which parameters are frozen differ",
    one_freezes_a_layer: "hyperparameters, or which parameters are frozen differ",
    states_remember_other_measurements: "the states that were loaded, differ",
    states_carry_other_norms: "the states that were loaded, differ",
    probabilities_differ: "the shared probabilities or draws differ",
    shared_draws_differ: "the shared probabilities or draws differ",
    one_saves_and_one_steps: "rank 0: step 0 exchange; rank 1: save at step 0",
    loaders_have_ten_and_thirteen_batches: "finish",
}


def all_differences():
    js.JointSparSGD(
        make_model().named_parameters(), comm=js.comm.local()
    )  # torch's first optimizer imports for seconds
    for function in DIFFERENCES:
        function()


def an_uncaught_difference():
    js.JointSparLARS(make_model().named_parameters(), sampling=js.Sampling(seed=js.comm.world().rank))


def test_ranks_that_differ_get_desync_error_on_both(run_ranks):
    job = run_ranks(2, all_differences)
    lines = [line for line in job.output.splitlines() if line.startswith("DESYNC")]
    assert len(lines) == 2 * len(DIFFERENCES)
    for words in set(DIFFERENCES.values()):
        expected = 2 * sum(words == other for other in DIFFERENCES.values())
        assert sum(words in line for line in lines) >= expected, job.output


def test_an_uncaught_difference_ends_the_job(run_ranks):
    job = run_ranks(2, an_uncaught_difference, expect_code=None)
    assert job.output.count("DesyncError: rank") == 2, job.output
