"""Checkpoints that resume bit for bit: safetensors files and a JSON manifest with their SHA-256, replaced atomically.

A checkpoint is a folder `step-00000042` in the directory that the user names, which all ranks must see:
`shared.safetensors` (weights and momentum, written by rank 0), `rank-R.safetensors` (that rank's buffers, probabilities
and torch's random state) and `manifest.json`. It gets its name only when every byte is on disk. Random state of NumPy
or of `random`, where a user's data depend on it, has its place in `extra`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from jointspar.comm.hashing import stable_hash
from jointspar.comm.heads import Op
from jointspar.errors import CheckpointError, warn_user
from jointspar.files import check_plain, sha256, sync_folder, write_whole
from jointspar.plain_json import from_json, to_json

FORMAT = 1
_MANIFEST = "manifest.json"
_SHARED = "shared.safetensors"
_MAX_MANIFEST_BYTES = 1 << 26  # twice what `save` lets the user add
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # of content whose digests are right


class _Refused(CheckpointError):
    """A checkpoint that may well be sound, but that this job cannot read or continue: it stays the newest."""


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

    Args:
        directory: made where it is missing; a file system that all ranks see. One for each optimizer.
        optimizer: JointSparLARS or JointSparSGD, outside of a synchronize/step pair.
        keep: how many checkpoints stay; older ones are deleted after this one is complete.

    Returns: the checkpoint's folder.
    Raises: DesyncError where another rank does something else, OSError where the folder cannot be written, TypeError
    for `extra` or scheduler state that JSON cannot hold or a model's state that is no tensor, ValueError for more than
    32 MiB of JSON, CheckpointError where the directory holds later steps, or checkpoints that this optimizer has
    neither saved nor loaded: another optimizer's, or another run's.
    """
    if keep < 1:
        raise ValueError(f"keep: {keep} is not at least 1")
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"model: {name!r} of its state is a {type(value).__name__}: only tensors can be saved")
    directory, comm, state = Path(directory), optimizer.comm, optimizer.state_dict()
    step = state["jointspar"]["step"]
    final, partial = directory / f"step-{step:08d}", directory / f".partial-step-{step:08d}"
    _refuse_others(directory, final, optimizer._checkpoint_directories)
    settings = {
        "param_groups": to_json(state["param_groups"]),
        "scheduler": to_json(scheduler.state_dict()) if scheduler is not None else None,
        "extra": to_json(extra or {}),
    }
    if len(json.dumps(settings, indent=1)) > _MAX_MANIFEST_BYTES // 2:
        raise ValueError("extra: with the scheduler's state it is too long, more than 32 MiB of JSON")
    optimizer.meet(Op.SAVE)
    if comm.rank == 0:
        for leftover in directory.glob(".partial-step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
    optimizer.meet(Op.SAVE)  # the folder is there
    _write_tensors(partial / _rank_file(comm.rank), _rank_tensors(model, state))
    if comm.rank == 0:
        _write_tensors(partial / _SHARED, _shared_tensors(model, state))
    optimizer.meet(Op.SAVE)  # every rank's file is there
    if comm.rank == 0:
        write_whole(partial / _MANIFEST, _manifest(partial, comm.world_size, step, settings))
        _publish(partial, final)
        for old in _checkpoints(directory)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    optimizer.meet(Op.SAVE)  # it has its name
    optimizer._checkpoint_directories.add(directory.resolve())
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
    expected = model.state_dict()
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }:
        raise CheckpointError(f"{folder}: is of another model (names or shapes of its tensors differ)")
    if scheduler is not None and manifest["scheduler"] is None:
        raise CheckpointError(f"{folder}: was saved without a scheduler")
    try:
        momenta = {int(index): {"momentum_buffer": tensor} for index, tensor in _take(shared, "momentum.").items()}
        groups, extra = from_json(manifest["param_groups"]), dict(from_json(manifest["extra"]))
        state = {"state": momenta, "param_groups": groups, "jointspar": _unflatten(own)}
        optimizer.check_state_dict(state)
        torch.Generator().set_state(own["random_state"])
        if "device_random_state" in own and own["device_random_state"].dtype != torch.uint8:
            raise ValueError("its random state of the device is malformed")
        if scheduler is not None:
            _load_scheduler(scheduler, from_json(manifest["scheduler"]))
    except _MALFORMED as error:
        raise CheckpointError(f"{folder}: {error}") from error
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])
    optimizer.load_state_dict(state)
    if manifest["world_size"] == optimizer.comm.world_size:
        torch.set_rng_state(own["random_state"])
        if (device := _device_of(model)) is not None and "device_random_state" in own:
            torch.cuda.set_rng_state(own["device_random_state"], device)
    else:  # every rank read rank 0's; alike on all ranks, dropout and augmentation would be the same on all
        torch.manual_seed(stable_hash([own["random_state"], np.array(optimizer.comm.rank)]))
    optimizer._checkpoint_directories.add(Path(directory).resolve())
    return extra


def _load_scheduler(scheduler: Any, state: object) -> None:
    """Load a state, or leave the scheduler as it was. Raises one of `_MALFORMED`."""
    if not isinstance(state, dict):
        raise ValueError("its scheduler's state is malformed")
    before = scheduler.state_dict()
    try:
        scheduler.load_state_dict(state)
    except _MALFORMED:
        scheduler.load_state_dict(before)
        raise


def _newest_sound(directory: Path, optimizer: Any) -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]:
    candidates = _checkpoints(directory)
    if not candidates:
        raise CheckpointError(f"{directory}: holds no checkpoint")
    problems: list[str] = []
    passed: list[Path] = []
    for folder in candidates:
        try:
            found = (
                folder,
                *_read(folder, optimizer.comm.rank, optimizer.comm.world_size, optimizer.is_rank_local),
            )
        except _Refused as error:  # perhaps on this rank alone
            warn_user(f"refusing a checkpoint: {error}")
            raise
        except CheckpointError as error:
            problems.append(str(error))
            passed.append(folder)
            warn_user(f"passing over a checkpoint: {error}")
            continue
        optimizer.meet(Op.LOAD, stable_hash(folder.name))
        if optimizer.comm.rank == 0:
            for other in passed:  # they must not stand before what is saved next
                os.replace(other, other.with_name(f"unusable-{other.name}-{time.time_ns()}"))
        return found
    raise CheckpointError("; ".join(problems))


def _read(
    folder: Path, rank: int, world_size: int, is_rank_local: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Manifest and tensors of one checkpoint, every byte of it verified."""
    try:
        check_plain(folder / _MANIFEST, _MAX_MANIFEST_BYTES)
        content = (folder / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        if content != _sealed(manifest):
            raise CheckpointError(f"{folder / _MANIFEST}: is damaged (its digest differs)")
        if manifest["format"] != FORMAT:
            raise _Refused(f"{folder}: has format {manifest['format']}, this version reads {FORMAT}")
        _check_names(folder, manifest)
        if manifest["world_size"] != world_size:
            if is_rank_local:
                raise _Refused(
                    f"{folder}: was saved by {manifest['world_size']} ranks, this job has {world_size}; "
                    'with strategy="independent", or an exchange that remembers, each rank has a state of its own, '
                    "so start as many"
                )
            rank = 0
        for name, expected in manifest["files"].items():
            if sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: is damaged (its SHA-256 differs from the manifest's)")
        shared = safetensors.torch.load_file(folder / _SHARED)
        return manifest, shared, safetensors.torch.load_file(folder / _rank_file(rank))
    except CheckpointError:
        raise
    except (*_ABSENT, safetensors.SafetensorError, *_MALFORMED) as error:
        raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from error
    except OSError as error:
        raise _Refused(f"{folder}: cannot be read now ({type(error).__name__}: {error})") from error


def _check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """A manifest may name any file of this machine: none is opened but those that `save` writes."""
    files, num_ranks = manifest["files"], manifest["world_size"]
    if type(num_ranks) is not int or len(files) != num_ranks + 1 or set(files) != set(_file_names(num_ranks)):
        raise CheckpointError(f"{folder / _MANIFEST}: does not list the files of a checkpoint")
    for name in files:
        check_plain(folder / name)


def _manifest(folder: Path, world_size: int, step: int, settings: dict[str, Any]) -> bytes:
    manifest = {"format": FORMAT, "world_size": world_size, "step": step, **settings}
    manifest["files"] = {name: sha256(folder / name) for name in _file_names(world_size)}
    return _sealed(manifest)


def _publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name; one of that name stays until then."""
    sync_folder(partial)
    former = final.with_name(f".former-{final.name}")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        os.replace(final, former)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _refuse_others(directory: Path, final: Path, own: set[Path]) -> None:
    """What is not this optimizer's would be replaced, deleted or loaded in place of it.

    Later checkpoints are another run's in any case; unreadable ones are passed over anyway.
    """
    for folder in _checkpoints(directory):
        if (folder / _MANIFEST).exists():
            if folder.name > final.name:
                raise CheckpointError(
                    f"{directory}: holds the later {folder.name}: load it, or save in another directory"
                )
            if directory.resolve() not in own:
                raise CheckpointError(
                    f"{directory}: holds {folder.name} of another optimizer or run: load it, or save in another "
                    "directory"
                )


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, its own digest at the end: 1e-8 and 1E-8 are the same number, not the same.

    Later formats must keep it, so that an earlier version tells them from damage.
    """
    content = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1).encode()


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
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        yield f"distribution.{name}", tensor
    for part in ("lesson", "exchange", "update"):
        for name, tensor in own[part].items():
            yield f"{part}.{name}", tensor
    yield "trainable", own["trainable"]
    yield "counters", torch.tensor([own["step"], own["skipped_in_a_row"]], dtype=torch.int64)
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
        "distribution": distribution,
        "lesson": _take(own, "lesson."),
        "exchange": _take(own, "exchange."),
        "update": _take(own, "update."),
    }


def _take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _file_names(world_size: int) -> list[str]:
    return [_SHARED, *(_rank_file(rank) for rank in range(world_size))]


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((path for path in directory.glob("step-*") if path.is_dir()), reverse=True)


def _write_tensors(path: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    contiguous = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
    write_whole(path, safetensors.torch.save(contiguous))
