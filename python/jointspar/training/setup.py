"""Before the first step: the ranks agree that all can start, the folder is ready, the optimizer is built."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import jointspar as js
from jointspar.comm.hashing import stable_hash
from jointspar.comm.transport import Transport
from jointspar.step.exchange import CustomExchange
from jointspar.training import baselines
from jointspar.training.config import (
    DEFAULT_TRUST_COEFFICIENT,
    METHODS,
    REFERENCE_BATCH,
    SAMPLING_FIELDS,
    TrainConfig,
)
from jointspar.training.data.batches import training_batches
from jointspar.training.data.datasets import Dataset
from jointspar.training.launch import local_rank
from jointspar.training.models import build_model
from jointspar.training.records import SUMMARY_FILE, has_checkpoint


class SetupError(ValueError):
    """The run cannot start as configured; raised on every rank alike. `is_speaker` marks the rank to report it."""

    def __init__(self, message: str, *, is_speaker: bool) -> None:
        super().__init__(message)
        self.is_speaker = is_speaker


def agree_on_start(comm: Transport, error: Exception | None, run: dict[str, object]) -> None:
    """Raise SetupError on every rank when any rank has an error, or was given another run (flags, data) than rank 0.

    The first rank with an error speaks.
    """
    words = np.array([error is not None, stable_hash(run)], dtype=np.int64)
    rows = comm.start_headers(words, what="set-up").wait()
    has_failed, hashes = rows[:, 0], rows[:, 1]
    if has_failed.any():
        first = int(has_failed.argmax())
        raise SetupError(str(error or f"rank {first} could not start"), is_speaker=comm.rank == first) from error
    if (hashes != hashes[0]).any():
        ranks = ", ".join(map(str, np.flatnonzero(hashes != hashes[0])))
        raise SetupError(
            f"rank {ranks} was given other flags or other data files than rank 0; start all ranks alike",
            is_speaker=comm.rank == 0,
        )


def check_warmup(config: TrainConfig, world_size: int) -> None:
    """Refuse a warm-up that would do nothing. Raises ValueError."""
    global_batch = world_size * config.batch_size
    if config.warmup_epochs and global_batch <= REFERENCE_BATCH:
        raise ValueError(
            f"--warmup-epochs does not act with {global_batch} samples per step: the rate starts low and rises only "
            f"where it is scaled up, above {REFERENCE_BATCH}; leave it out, or give a larger --batch-size"
        )


def check_settings(config: TrainConfig, world_size: int, dataset: Dataset) -> None:
    """What a run would refuse before its first step, without other ranks. Raises ValueError naming the argument."""
    training_batches(dataset.train, config.batch_size, 0, world_size, config.seed)
    check_warmup(config, world_size)
    its = dataset.properties
    model = build_model(config.model, its.in_channels, its.num_classes, its.image_size, seed=config.seed)
    make_optimizer(config, model, js.comm.local(), steps_per_epoch=1).release()


def find_device(config: TrainConfig) -> torch.device:
    """Where this rank trains. Raises ValueError where torch finds no such device."""
    if config.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here: leave it out to train on the CPU")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def prepare_folder(config: TrainConfig) -> None:
    """Make config.out and see that it can be written, and that no other run is in it. Raises ValueError."""
    folder = config.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}; give another folder") from error
    is_begun = has_checkpoint(folder)
    if config.resume and not is_begun:
        raise ValueError(
            f"--resume: no checkpoint in {folder}; start without --resume, or give the --out of a started run"
        )
    if not config.resume and (is_begun or (folder / SUMMARY_FILE).exists()):
        raise ValueError(f"--out {folder} holds a run already: continue it with --resume, or give another folder")


def check_continuation(config: TrainConfig, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a run began with. Raises ValueError."""
    for name, value in now.items():
        was = before.get(name, value)
        is_other_kind = name == "budget" and type(was) is not type(value)  # 1 layer is not 1.0, all layers
        if was != value or is_other_kind:
            follows = name in ("warmup_epochs", "milestones") and getattr(config, name) is None
            with_what = f" with --epochs {config.epochs}" if follows else ""
            raise ValueError(
                f"--resume: {name} was {was!r} and is now {value!r}{with_what}: "
                "continue with the settings that the run began with, or start another in a new --out"
            )


def make_optimizer(
    config: TrainConfig, model: torch.nn.Module, comm: Transport, steps_per_epoch: int
) -> js.JointSparLARS | js.JointSparSGD:
    """The optimizer of config.method; all but JointSpar's are the same optimizers with every layer active."""
    method = METHODS[config.method]
    if method.is_sparse:
        given = {name: getattr(config, name) for name in SAMPLING_FIELDS if getattr(config, name) is not None}
        dense_epochs = config.dense_epochs or 0
        dense_steps = max(round(dense_epochs * steps_per_epoch), int(dense_epochs > 0))
        sampling = js.Sampling(**given, dense_steps=dense_steps, seed=config.seed)
    else:
        sampling = js.Sampling(budget=1.0, strategy="shared", distribution="uniform", seed=config.seed)
    options: dict[str, Any] = {
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "nesterov": config.nesterov,
        "overlap": config.overlap,
        "sampling": sampling,
        "comm": comm,
    }
    for name in ("inactive", "wire_dtype", "exchange"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    if method.wire_dtype is not None:
        options["wire_dtype"] = method.wire_dtype
    if method.compressor is not None:
        options["exchange"] = make_compressed_exchange(method.compressor, config, model)
    lr = config.scaled_base_lr(comm.world_size)  # the scheduler sets the rate before the first step
    if not method.is_layerwise:
        return js.JointSparSGD(model.named_parameters(), lr=lr, **options)
    trust = DEFAULT_TRUST_COEFFICIENT if config.trust_coefficient is None else config.trust_coefficient
    return js.JointSparLARS(model.named_parameters(), lr=lr, trust_coefficient=trust, **options)


def make_compressed_exchange(compressor: str, config: TrainConfig, model: torch.nn.Module) -> CustomExchange:
    """The exchange of a baseline, with what config says of it, else its own defaults."""
    shapes = [parameter.shape for parameter in model.parameters()]
    sizes = [shape.numel() for shape in shapes]
    ratio = {} if config.compression_ratio is None else {"ratio": config.compression_ratio}
    levels = {} if config.qsgd_levels is None else {"levels": config.qsgd_levels}
    rank = {} if config.powersgd_rank is None else {"rank": config.powersgd_rank}
    if compressor == "randomk":
        return baselines.RandomK(sizes, seed=config.seed, **ratio)
    if compressor == "powersgd":
        return baselines.PowerSgd(shapes, seed=config.seed, **rank)
    codes: dict[str, baselines.Compressor] = {
        "topk": baselines.TopK(**ratio),
        "signsgd": baselines.ScaledSign(),
        "qsgd": baselines.Qsgd(**levels),
        "terngrad": baselines.TernGrad(),
    }
    return baselines.Gathered(codes[compressor], sizes, seed=config.seed)
