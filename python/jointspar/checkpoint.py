"""Checkpoints that resume bit for bit: safetensors files and a JSON manifest with their SHA-256, replaced atomically.

A checkpoint is a folder `step-00000042` in the directory that the user names, which all ranks must see:
`shared.safetensors` (weights and momentum, written by rank 0), `rank-R.safetensors` (that rank's buffers, probabilities
and torch's random state) and `manifest.json`. It gets its name only when every byte is on disk. What else differs by
rank, such as random numbers of NumPy that a user's data depend on, is best derived from seed, rank and step.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jointspar import checkpoint_files as on_disk
from jointspar.comm.hashing import stable_hash
from jointspar.comm.heads import Op
from jointspar.comm.transport import Transport
from jointspar.errors import CheckpointError, warn_user
from jointspar.model_state import each_once, repeats_alike
from jointspar.plain_json import from_json, to_json

_PROBLEM_BYTES = 512  # of a rank's error that other ranks repeat


def save(
    directory: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint of model, optimizer, scheduler and `extra` (plain JSON data). Collective.

    Of `extra` and the scheduler rank 0's are written, and every rank loads them. Numbers there and in parameter groups
    may be tensors of one element, which come back as such.

    Args:
        directory: made where it is missing; a file system that all ranks see. One or more for each optimizer.
        optimizer: JointSparLARS or JointSparSGD, outside of a synchronize/step pair.
        keep: how many checkpoints stay; older ones are deleted after this one is complete.

    Returns: the checkpoint's folder.
    Raises: DesyncError where another rank does something else, OSError where the folder cannot be written. Before
    anything is written, and with a CheckpointError on the other ranks: TypeError for `extra` or scheduler state that
    JSON cannot hold, or for a model's state that is no tensor, sparse, nested, quantized or of a dtype that safetensors
    lacks, ValueError for more than 32 MiB of JSON, CheckpointError where the directory holds later steps, or
    checkpoints of another optimizer or run: a run begins with an optimizer, and goes on with every one that loads a
    checkpoint of it. Later a CheckpointError on a rank that does not see the directory.
    """
    directory, comm, state = Path(directory), optimizer.comm, optimizer.state_dict()
    step = state["jointspar"]["step"]
    name = on_disk.folder_name(step)
    final, partial = directory / name, directory / f".partial-{name}"
    problem, settings = None, {}
    try:
        if keep < 1:
            raise ValueError(f"keep: {keep} is not at least 1")
        on_disk.check_model(model)
        on_disk.refuse_others(directory, final, optimizer._run)
        settings = _settings(state, scheduler, extra)
    except Exception as error:  # whatever it is: the other ranks are to hear of it, not to wait
        problem = error
    optimizer.meet(Op.SAVE)
    _agree_that_all_can_save(comm, problem)
    settings["run"] = optimizer._run = _agreed_run(comm, optimizer._run)
    if comm.rank == 0:
        on_disk.make_partial(partial)
    optimizer.meet(Op.SAVE)  # the folder is there
    try:
        on_disk.write_tensors(partial / on_disk.rank_file(comm.rank), _rank_tensors(model, state))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{partial}: rank {comm.rank} does not see the folder that rank 0 made: all ranks need one file system"
        ) from error
    if comm.rank == 0:
        on_disk.write_tensors(partial / on_disk.SHARED, _shared_tensors(model, state))
    optimizer.meet(Op.SAVE)  # every rank's file is there
    if comm.rank == 0:
        on_disk.write_manifest(partial, comm.world_size, step, settings)
        on_disk.publish(partial, final, keep)
    optimizer.meet(Op.SAVE)  # it has its name
    return final


def load(
    directory: str | os.PathLike[str], *, model: torch.nn.Module, optimizer: Any, scheduler: Any = None
) -> dict[str, Any]:
    """Continue from the newest sound checkpoint in `directory`. Collective.

    A damaged checkpoint is passed over with a warning for the one before it, and renamed `unusable-...`; one of a later
    version, or that cannot be read at the moment (permissions, a file system that is away), is refused. Another world
    size is refused with strategy="independent", whose probabilities are each rank's own, and with an exchange whose
    state is; otherwise rank 0's buffers and probabilities go to every rank, and torch's random numbers are seeded from
    rank 0's state, others on each rank. A schedule that counts steps, as `linear_scaling_warmup`, does not fit then:
    leave `scheduler` out, build it for the new number of ranks, and step it to where training is.

    Files of strangers run no code: only plain files of the names that `save` gives are opened, and read as numbers.

    Returns: the `extra` that was saved.
    Raises: CheckpointError where no sound checkpoint of this model is there; nothing was changed then.
    """
    folder, manifest, shared, own = _newest_sound(Path(directory), optimizer)
    weights = _take(shared, "model.") | _take(own, "model.")
    expected = _targets(folder, model, weights)
    if scheduler is not None and manifest["scheduler"] is None:
        raise CheckpointError(f"{folder}: was saved without a scheduler")
    try:
        momenta = {int(index): {"momentum_buffer": tensor} for index, tensor in _take(shared, "momentum.").items()}
        groups, extra = from_json(manifest["param_groups"]), dict(from_json(manifest["extra"]))
        run = _checked_run(manifest.get("run", ""))
        state = {"state": momenta, "param_groups": groups, "jointspar": _unflatten(own)}
        optimizer.check_state_dict(state)
        _move_to_devices_of(optimizer.param_groups, groups)
        torch.Generator().set_state(own["random_state"])
        if "device_random_state" in own and own["device_random_state"].dtype != torch.uint8:
            raise ValueError("its random state of the device is malformed")
        if scheduler is not None:
            _load_scheduler(scheduler, from_json(manifest["scheduler"]))
    except on_disk.MALFORMED as error:
        raise CheckpointError(f"{folder}: {error}") from error
    with torch.no_grad():
        for name, tensor in expected.items():
            each_once(tensor).copy_(each_once(weights[name], like=tensor))
    optimizer.load_state_dict(state)
    optimizer._run = run
    if manifest["world_size"] == optimizer.comm.world_size:
        torch.set_rng_state(own["random_state"])
        if (device := _device_of(model)) is not None and "device_random_state" in own:
            torch.cuda.set_rng_state(own["device_random_state"], device)
    else:  # every rank read rank 0's; alike on all ranks, dropout and augmentation would be the same on all
        torch.manual_seed(stable_hash([own["random_state"], np.array(optimizer.comm.rank)]))
    return extra


def _settings(state: dict[str, Any], scheduler: Any, extra: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest holds of the optimizer's groups, the scheduler and `extra`."""
    settings = {
        "param_groups": to_json(state["param_groups"]),
        "scheduler": to_json(scheduler.state_dict()) if scheduler is not None else None,
        "extra": to_json(extra or {}),
    }
    if len(json.dumps(settings, indent=1)) > on_disk.MAX_MANIFEST_BYTES // 2:
        raise ValueError("extra: with the scheduler's state it is too long, more than 32 MiB of JSON")
    return settings


def _agree_that_all_can_save(comm: Transport, problem: Exception | None) -> None:
    """Raise this rank's problem, or CheckpointError with that of the first rank that has one. Collective."""
    words = np.zeros(1 + _PROBLEM_BYTES // 8, dtype=np.int64)
    if problem is not None:
        words[0] = 1
        text = np.frombuffer(str(problem).encode(errors="replace")[:_PROBLEM_BYTES], dtype=np.uint8)
        words[1:].view(np.uint8)[: text.size] = text
    rows = comm.start_headers(words, what="whether all ranks can save").wait()
    if problem is not None:
        raise problem
    if rows[:, 0].any():
        first = int(rows[:, 0].argmax())
        reason = rows[first, 1:].tobytes().rstrip(b"\0").decode(errors="replace")
        raise CheckpointError(f"rank {first} cannot save: {reason}")


def _agreed_run(comm: Transport, run: str | None) -> str:
    """Rank 0's run, or a new one, which has a name that no other has. Collective."""
    number = secrets.randbits(63) if run is None else int(run, 16) if run else -1
    shared = torch.tensor([number], device="cpu")
    comm.broadcast(shared, 0, what="name of the run")  # at every save: not all ranks may have it
    return f"{int(shared):016x}" if int(shared) >= 0 else ""


def _checked_run(run: str) -> str:
    """16 hexadecimal digits; none in checkpoints of earlier versions. Raises ValueError or TypeError."""
    if not re.fullmatch(r"([0-7][0-9a-f]{15})?", run):
        raise ValueError("its run is malformed")
    return run


def _targets(folder: Path, model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state, into which all of `weights` can be copied. Raises CheckpointError."""
    try:
        on_disk.check_model(model)
    except TypeError as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
    expected = model.state_dict()
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }:
        raise CheckpointError(f"{folder}: is of another model (names or shapes of its tensors differ)")
    for name, tensor in expected.items():
        if not repeats_alike(weights[name], tensor):
            raise CheckpointError(
                f"{folder}: is of another model: its {name!r} holds several values where this model's expands one"
            )
    return expected


def _move_to_devices_of(present: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    """Rates in tensors go where those are in whose place they come; what the manifest holds is in host memory."""
    for here, group in zip(present, loaded, strict=True):
        for name, value in group.items():
            if isinstance(value, torch.Tensor) and isinstance(here.get(name), torch.Tensor):
                group[name] = value.to(here[name].device)


def _load_scheduler(scheduler: Any, state: object) -> None:
    """Load a state, or leave the scheduler as it was. Raises one of `checkpoint_files.MALFORMED`."""
    if not isinstance(state, dict):
        raise ValueError("its scheduler's state is malformed")
    before = scheduler.state_dict()
    try:
        scheduler.load_state_dict(state)
    except on_disk.MALFORMED:
        scheduler.load_state_dict(before)
        raise


def _newest_sound(directory: Path, optimizer: Any) -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]:
    candidates = on_disk.checkpoints_in(directory)
    if not candidates:
        raise CheckpointError(f"{directory}: holds no checkpoint")
    problems: list[str] = []
    passed: list[Path] = []
    for folder in candidates:
        try:
            found = (
                folder,
                *on_disk.read(folder, optimizer.comm.rank, optimizer.comm.world_size, optimizer.is_rank_local),
            )
        except on_disk.Refused as error:  # perhaps on this rank alone
            warn_user(f"refusing a checkpoint: {error}")
            raise
        except CheckpointError as error:
            problems.append(str(error))
            passed.append(folder)
            warn_user(f"passing over a checkpoint: {error}")
            continue
        optimizer.meet(Op.LOAD, stable_hash(folder.name))
        if optimizer.comm.rank == 0:
            on_disk.set_aside(passed)
        return found
    raise CheckpointError("; ".join(problems))


def _shared_tensors(model: torch.nn.Module, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is the same on all ranks: weights and momentum."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name in parameters:
            yield f"model.{name}", tensor
    for index, entry in state["state"].items():
        yield f"momentum.{index}", entry["momentum_buffer"]


def _rank_tensors(model: torch.nn.Module, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """What each rank has of its own: buffers, distribution, counters, random state."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield f"model.{name}", tensor
    own = state["jointspar"]
    for name, value in own["distribution"].items():
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        yield f"distribution.{name}", tensor
    for part in ("lesson", "exchange", "update"):
        for name, tensor in own[part].items():
            yield f"{part}.{name}", tensor
    for name in ("trainable", "trainable_before"):
        yield name, own[name]
    yield "counters", torch.tensor([own["step"], own["skipped_in_a_row"]], device="cpu")
    yield "random_state", torch.get_rng_state()
    if (device := _device_of(model)) is not None:
        yield "device_random_state", torch.cuda.get_rng_state(device)


def _device_of(model: torch.nn.Module) -> torch.device | None:
    """The CUDA device of a model's parameters; None: the CPU."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return devices.pop() if devices else None


def _unflatten(own: dict[str, torch.Tensor]) -> dict[str, Any]:
    distribution: dict[str, Any] = {name: np.asarray(value) for name, value in _take(own, "distribution.").items()}
    distribution["gradient_bound"] = float(distribution["gradient_bound"])
    step, skipped = own["counters"].tolist()
    return {
        "step": step,
        "skipped_in_a_row": skipped,
        "trainable": own["trainable"],
        "trainable_before": own.get("trainable_before", own["trainable"]),  # earlier versions kept none
        "distribution": distribution,
        "lesson": _take(own, "lesson."),
        "exchange": _take(own, "exchange."),
        "update": _take(own, "update."),
    }


def _take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
