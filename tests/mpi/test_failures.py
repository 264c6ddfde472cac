"""What ends a job, in which order, and what it leaves behind, whatever phase it is in."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import jointspar as js
import warm_python
from jobs import find_launcher, run_job
from jointspar.comm import watchdog
from jointspar.errors import DesyncError
from support import launched

pytestmark = pytest.mark.mpi


def make_model(num_layers=2):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def fault():
    print(f"FAULT {time.time()}\n", end="", flush=True)


def leave_before_an_optimizer_is_built():
    js.JointSparSGD(make_model().named_parameters(), comm=js.comm.local())  # torch's first one imports for seconds
    comm = js.comm.world()
    if comm.rank == 1:
        fault()
        return
    js.JointSparSGD(make_model().named_parameters())


def leave_when_the_others_save():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters())
    train(model, optimizer, 2)
    if optimizer.comm.rank == 1:
        fault()
        sys.exit(0)
    js.checkpoint.save(os.environ["RESULT"], model=model, optimizer=optimizer)


def leave_when_the_others_average():
    model = make_model()
    train(model, js.JointSparSGD(model.named_parameters()), 1)
    if js.comm.world().rank == 1:
        fault()
        sys.exit(0)
    js.sync_buffers(model)


def leave_when_the_others_build_a_larger_optimizer():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters())
    train(model, optimizer, 1)
    optimizer.finish()
    if optimizer.comm.rank == 1:
        fault()
        sys.exit(0)
    js.JointSparSGD(make_model(100).named_parameters())


WHO_DOES_WHAT = {
    leave_before_an_optimizer_is_built: "rank 0: construction of an optimizer; rank 1: exit of the process",
    leave_when_the_others_save: "rank 0: save at step 2; rank 1: finish at step 2",
    leave_when_the_others_average: "rank 0: average at step 1; rank 1: finish at step 1",
    leave_when_the_others_build_a_larger_optimizer: "rank 0: construction of an optimizer; rank 1: exit of the process",
}


# The agreement is the same code on both; what differs is who ends the job.
LAUNCHED = [("mpirun", program) for program in WHO_DOES_WHAT] + [("torchrun", leave_when_the_others_save)]


@pytest.mark.parametrize(
    ("launcher", "program"), LAUNCHED, indirect=["launcher"], ids=lambda each: getattr(each, "__name__", each)
)
def test_a_rank_that_exits_early_ends_the_job_in_every_phase(run_ranks, tmp_path, program):
    job = run_ranks(2, program, expect_code=None, env={"RESULT": str(tmp_path)})
    text = f"DesyncError: rank 0: the ranks are about to do different things: {WHO_DOES_WHAT[program]}"
    assert text in job.output
    assert job.seconds_after("FAULT") < 5


def step_two_optimizers_in_different_order():
    models = [make_model(2), make_model(100)]
    optimizers = [js.JointSparSGD(model.named_parameters()) for model in models]
    for k in (0, 1) if optimizers[0].comm.rank == 0 else (1, 0):
        train(models[k], optimizers[k], 1)


def test_optimizers_of_different_sizes_in_different_order_are_a_desync(run_ranks):
    job = run_ranks(2, step_two_optimizers_in_different_order, expect_code=None)
    text = "rank 0: step 0 exchange of optimizer 1; rank 1: step 0 exchange of optimizer 2"
    for rank in range(2):
        assert f"DesyncError: rank {rank}: the ranks are about to do different things: {text}" in job.output


def hold_the_gil_while_waiting():
    watchdog.GRACE_SECONDS = 1.0
    transport = launched(timeout=1.0)
    transport.start_headers(np.zeros(1, dtype=np.int64), what="step 1").wait()
    if transport.rank == 1:
        time.sleep(60)
    hold = ctypes.PyDLL(None).sleep  # keeps the GIL, unlike CDLL
    threading.Timer(0.3, hold, [60]).start()
    transport.start_headers(np.zeros(1, dtype=np.int64), what="step 2").wait()


def test_a_wait_ends_the_job_though_a_thread_holds_the_gil_for_ever(run_ranks):
    job = run_ranks(2, hold_the_gil_while_waiting, expect_code=None, timeout=45)
    assert "rank 0: step 2: no end, and Python does not run" in job.output


def fail_after_some_messages():
    transport = launched()
    for step in range(40):
        transport.allreduce(torch.ones(3), what=f"step {step} exchange")
    if transport.rank == 1:
        raise ZeroDivisionError("the fault")
    time.sleep(30)


def test_the_last_operations_are_shown_and_written(run_ranks, tmp_path):
    job = run_ranks(2, fail_after_some_messages, expect_code=None, env={"JOINTSPAR_FAILURE_DIR": str(tmp_path / "new")})
    shown = [line for line in job.output.splitlines() if "  rank 1: step" in line]
    assert len(shown) == 32, job.output
    assert "step 8 exchange: allreduce, 12 bytes, " in shown[0] and "step 39 exchange" in shown[-1]
    written = json.loads((tmp_path / "new" / "rank-1.json").read_text())
    assert written["reason"] == "uncaught ZeroDivisionError"
    assert [operation["what"] for operation in written["operations"]] == [f"step {k} exchange" for k in range(8, 40)]
    assert all(operation["is_finished"] and operation["bytes"] == 12 for operation in written["operations"])


def gloo_threads():
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    return [name for name in names if "gloo" in name]


def count_threads():
    transport = launched()
    transport.allreduce(torch.ones(3), what="test")
    assert gloo_threads()
    transport.close()
    torch.distributed.destroy_process_group()
    assert gloo_threads() == []


@pytest.mark.parametrize("launcher", ["torchrun"], indirect=True)
def test_closing_ends_the_threads_of_the_groups(run_ranks):
    """So that none is left when the interpreter ends."""
    run_ranks(2, count_threads)


def uneven_loaders():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    rank = optimizer.comm.rank
    for lengths in ((10, 13), (13, 10), (1, 4), (5, 5), (0, 3)):
        seen = []
        for batch in optimizer.even_batches(range(lengths[rank])):
            seen.append(batch)
            train(model, optimizer, 1)
        assert seen == list(range(min(lengths)))
    optimizer.finish()
    print(f"EVEN rank {rank}\n", end="", flush=True)


def test_even_batches_end_on_all_ranks_with_the_shortest_loader(run_ranks):
    assert run_ranks(2, uneven_loaders).output.count("EVEN") == 2


def flip_a_weight_bit():
    model = make_model(3)
    optimizer = js.JointSparSGD(model.named_parameters(), check_every=2, sampling=js.Sampling(budget=1.0))
    train(model, optimizer, 4)
    if optimizer.comm.rank == 1:
        model[1].weight.data.view(torch.int32)[2, 1] ^= 1 << 20
    with pytest.raises(DesyncError, match="layer 1 '1' differs: rank 1 against rank 0") as caught:
        train(model, optimizer, 2)
    assert "check of the weights at step 6" in str(caught.value)
    print(f"FOUND rank {optimizer.comm.rank}\n", end="", flush=True)


def test_a_flipped_weight_bit_is_found_and_named(run_ranks):
    assert run_ranks(2, flip_a_weight_bit).output.count("FOUND") == 2


FLAGS = ["--dataset", "digits", "--epochs", "2", "--batch-size", "32", "--exchange", "ring", "--log-every", "1"]


def run_training(launcher, out, *more, program=None):
    program = program or warm_python.command("-m", "jointspar", "train")
    return run_job([*find_launcher(launcher), "2", *program, *FLAGS, *more, "--out", str(out)], 120)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nobody stops, under mpirun: the ring gives the same bits under torchrun."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_training("mpirun", folder).code == 0
    return folder


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_sigterm_on_one_rank_ends_all_in_order_and_the_run_resumes_bit_for_bit(launcher, tmp_path, uninterrupted):
    stopped = run_training(launcher, tmp_path, program=(sys.executable, __file__, "7"))
    assert stopped.code != 0
    assert not (tmp_path / "summary.json").exists()
    assert len(list((tmp_path / "checkpoint").glob("step-*"))) == 1
    assert stopped.output.count("jointspar train: stopped by a signal after step ") == 2, stopped.output
    assert run_training(launcher, tmp_path, "--resume").code == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, uninterrupted)]
    for key in ("train_loss", "test_accuracy", "world_size", "bytes_sent", "active_fraction"):
        assert summaries[0][key] == summaries[1][key]
    newest = [max((folder / "checkpoint").glob("step-*")) for folder in (tmp_path, uninterrupted)]
    assert newest[0].name == newest[1].name
    for file in ("shared.safetensors", "rank-0.safetensors", "rank-1.safetensors"):
        resumed, whole = (load_file(folder / file) for folder in newest)
        assert resumed.keys() == whole.keys()
        different = {name for name in whole if not torch.equal(resumed[name], whole[name])}
        assert different <= {"random_state"}  # torch's own generator, which `jointspar train` neither seeds nor uses


def main():
    """`jointspar train`, with SIGTERM to rank 1 in the middle of a step."""
    from jointspar.cli import main as command_line

    step, *arguments = sys.argv[1:]
    original = js.JointSparLARS.step

    def stepping(self, *given, **named):
        if self.comm.rank == 1 and self._pipeline.step_count == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given, **named)

    js.JointSparLARS.step = stepping
    sys.exit(command_line(["train", *arguments]))


if __name__ == "__main__":
    main()
