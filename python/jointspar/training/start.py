"""The command `jointspar train`: the ranks agree on a start, the loop runs, signals end it in order."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import jointspar as js
from jointspar.comm.hashing import stable_hash
from jointspar.comm.transport import Transport
from jointspar.training.config import TrainConfig
from jointspar.training.data.batches import training_batches
from jointspar.training.data.datasets import Dataset, load_dataset
from jointspar.training.launch import STOP_SIGNALS, launcher_rank, threads_per_rank
from jointspar.training.loop import Run
from jointspar.training.records import Summary
from jointspar.training.setup import SetupError, agree_on_start, check_warmup, find_device, prepare_folder


def train(config: TrainConfig) -> Summary:
    """Train one model and write config.out/{summary.json, metrics.jsonl, curves.png, checkpoint/}.

    Collective: every rank of `js.comm.world()` calls it with the same config; only rank 0 writes. Each epoch ends with
    batch-norm buffers averaged, an evaluation sharded over the ranks, and a checkpoint. The same config, world size and
    threads give the same weights on the CPU, in one go or resumed. With config.simulate_workers this process plays all
    ranks. On a GPU phase_ms are the host's times, which runs ahead of it.
    SIGTERM or SIGUSR1 on any rank ends the run in order: all ranks finish the same step and write a checkpoint.
    Raises SetupError when data, flags or folders do not allow a start, StoppedError on every rank after such a signal.
    """
    try:
        comm = js.comm.world()
    except js.errors.JointSparError as error:
        raise SetupError(str(error), is_speaker=launcher_rank() == 0) from error
    torch.set_num_threads(config.threads or threads_per_rank())
    if config.simulate_workers is None:
        return _train_on(comm, config, load_dataset)
    if comm.world_size > 1:
        raise SetupError(
            f"--simulate-workers does not act under a launcher, which started {comm.world_size} ranks: leave it out, "
            "or start one process",
            is_speaker=comm.rank == 0,
        )
    load_once = functools.cache(load_dataset)  # the ranks read the same memory
    return js.comm.run_simulated(config.simulate_workers, lambda rank: _train_on(rank, config, load_once))[0]


def _train_on(comm: Transport, config: TrainConfig, load: Callable[..., Dataset]) -> Summary:
    """What one rank does, from its set-up to the end."""
    run = _set_up(config, comm, load)
    try:
        with _stop_on_signals(run.optimizer):
            return run.fit()
    finally:
        run.close()


def _set_up(config: TrainConfig, comm: Transport, load: Callable[..., Dataset]) -> Run:
    """Read the data and prepare the folder, agree that every rank could, then build the run."""
    error = None
    identity = config.identity()
    try:
        dataset = load(config.dataset, config.data_dir)
        batches = training_batches(dataset.train, config.batch_size, comm.rank, comm.world_size, config.seed)
        check_warmup(config, comm.world_size)
        device = find_device(config)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else whatever asks for the current one makes a context on the first
        samples = stable_hash([dataset.train.fingerprint, dataset.test.fingerprint])
        identity["data"] = f"{len(dataset.train)} + {len(dataset.test)} images, {samples:016x}"
        if comm.rank == 0:
            prepare_folder(config)
    except (ValueError, OSError) as caught:
        error = caught
    agree_on_start(comm, error, identity)
    try:
        return Run(config, comm, dataset, batches, identity, device)
    except (ValueError, js.errors.CheckpointError) as caught:  # alike on all ranks, but for files that one cannot read
        raise SetupError(str(caught), is_speaker=comm.rank == 0) from caught


@contextmanager
def _stop_on_signals(optimizer: js.JointSparLARS | js.JointSparSGD) -> Iterator[None]:
    """Only the main thread may handle signals; in another one they keep their meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda *_: optimizer.request_stop()) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
