"""A checkpoint's files: their names, the manifest that seals them, written whole and read with suspicion."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from jointspar.errors import CheckpointError
from jointspar.files import check_plain, sha256, sync_folder, write_whole
from jointspar.model_state import why_not_plain

FORMAT = 1
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
MAX_MANIFEST_BYTES = 1 << 26  # twice what `save` lets the user add
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # of content whose digests are right
_COMPLEX = "complex128."  # before the name of a tensor that is written as pairs of float64
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Refused(CheckpointError):
    """A checkpoint that may well be sound, but that this job cannot read or continue: it stays the newest."""


def _file_names(world_size: int) -> list[str]:
    return [SHARED, *(rank_file(rank) for rank in range(world_size))]


def rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def checkpoints_in(directory: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((path for path in directory.glob("step-*") if path.is_dir()), key=_place, reverse=True)


def folder_name(step: int) -> str:
    """A checkpoint's; from step 100,000,000 on it is longer, so names are compared by `_place` and not as text."""
    return f"step-{step:08d}"


def _place(folder: Path) -> tuple[bool, int, str]:
    """Orders folders by their steps; of those that users named, `step-` is the oldest and `step-WORD` the newest."""
    name = folder.name.removeprefix("step-")
    digits = name[: len(name) - len(name.lstrip("0123456789"))]
    return bool(name) and not digits, int(digits or -1), name


def check_model(model: torch.nn.Module) -> None:
    """Raises TypeError for a part of its state that no file holds, or into which none is read."""
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"model: {name!r} of its state is a {type(value).__name__}: only tensors can be saved")
        fault = why_not_plain(value)
        if fault is None and not _can_hold(value.dtype):
            fault = f"is of {value.dtype}, which safetensors does not hold"
        if fault is not None:
            raise TypeError(f"model: {name!r} of its state {fault}, so it cannot be saved")


@functools.cache
def _can_hold(dtype: torch.dtype) -> bool:
    """Whether tensors of this kind come back from a file: that depends on the version of safetensors."""
    if dtype == torch.complex128:
        return True
    try:
        written = safetensors.torch.save({"it": torch.empty(0, dtype=dtype, device="cpu")})
        return bool(safetensors.torch.load(written)["it"].dtype == dtype)
    except MALFORMED:
        return False


def write_tensors(path: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Tensors as a model has them that `check_model` has passed."""
    contiguous = {}
    for name, tensor in tensors:
        own = tensor.detach().clone(memory_format=torch.contiguous_format)
        if own.dtype == torch.complex128:  # safetensors has none
            name, own = f"{_COMPLEX}{name}", torch.view_as_real(own.resolve_conj())
        contiguous[name] = own
    write_whole(path, safetensors.torch.save(contiguous))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if name.startswith(_COMPLEX):
            tensor = torch.view_as_complex(tensor.clone())  # a file's memory is aligned for one float64, not for two
        tensors[name.removeprefix(_COMPLEX)] = tensor
    return tensors


def read(
    folder: Path, rank: int, world_size: int, is_rank_local: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Manifest and tensors of one checkpoint, every byte of it verified."""
    try:
        manifest = _read_manifest(folder)
        if manifest["format"] != FORMAT:
            raise Refused(f"{folder}: has format {manifest['format']}, this version reads {FORMAT}")
        _check_names(folder, manifest)
        if manifest["world_size"] != world_size:
            if is_rank_local:
                raise Refused(
                    f"{folder}: was saved by {manifest['world_size']} ranks, this job has {world_size}; "
                    'with strategy="independent", or an exchange that remembers, each rank has a state of its own, '
                    "so start as many"
                )
            rank = 0
        for name, expected in manifest["files"].items():
            if sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name}: is damaged (its SHA-256 differs from the manifest's)")
        return manifest, _read_tensors(folder / SHARED), _read_tensors(folder / rank_file(rank))
    except CheckpointError:
        raise
    except (*_ABSENT, safetensors.SafetensorError, *MALFORMED) as error:
        raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from error
    except OSError as error:
        raise Refused(f"{folder}: cannot be read now ({type(error).__name__}: {error})") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    check_plain(folder / MANIFEST, MAX_MANIFEST_BYTES)
    content = (folder / MANIFEST).read_bytes()
    manifest: dict[str, Any] = json.loads(content)
    if content != _sealed(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: is damaged (its digest differs)")
    return manifest


def _check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """A manifest may name any file of this machine: none is opened but those that `save` writes."""
    files, num_ranks = manifest["files"], manifest["world_size"]
    if type(num_ranks) is not int or len(files) != num_ranks + 1 or set(files) != set(_file_names(num_ranks)):
        raise CheckpointError(f"{folder / MANIFEST}: does not list the files of a checkpoint")
    for name in files:
        check_plain(folder / name)


def make_partial(partial: Path) -> None:
    """A folder for the files of a checkpoint that is not complete yet; what was left of others is removed."""
    for leftover in partial.parent.glob(".partial-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)


def write_manifest(folder: Path, world_size: int, step: int, settings: dict[str, Any]) -> None:
    """Name and digest every file of a checkpoint, when all are there."""
    manifest = {"format": FORMAT, "world_size": world_size, "step": step, **settings}
    manifest["files"] = {name: sha256(folder / name) for name in _file_names(world_size)}
    write_whole(folder / MANIFEST, _sealed(manifest))


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, its own digest at the end: 1e-8 and 1E-8 are the same number, not the same.

    Later formats must keep it, so that an earlier version tells them from damage.
    """
    content = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1).encode()


def publish(partial: Path, final: Path, keep: int) -> None:
    """Give a complete checkpoint its name; one of that name stays until then. Of older ones the newest stay."""
    sync_folder(partial)
    former = final.with_name(f".former-{final.name}")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        os.replace(final, former)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(former, ignore_errors=True)
    older = [folder for folder in checkpoints_in(final.parent) if _place(folder) < _place(final)]
    for old in older[keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def set_aside(folders: Sequence[Path]) -> None:
    """Rename damaged checkpoints: they must not stand before what is saved next."""
    for folder in folders:
        os.replace(folder, folder.with_name(f"unusable-{folder.name}-{time.time_ns()}"))


def refuse_others(directory: Path, final: Path, run: str | None) -> None:
    """What is of another run than `run` (None: of any) would be replaced, deleted or loaded in place of this one's.

    Later checkpoints are another run's in any case; folders without a sound manifest hold nothing that could be loaded.
    """
    for folder in checkpoints_in(directory):
        try:
            found = _read_manifest(folder).get("run", "")
        except (CheckpointError, *_ABSENT, *MALFORMED):
            continue
        except OSError as error:
            raise Refused(f"{folder}: cannot be read now ({type(error).__name__}: {error})") from error
        if _place(folder) > _place(final):
            raise CheckpointError(f"{directory}: holds the later {folder.name}: load it, or save in another directory")
        if run is None or found != run:
            raise CheckpointError(
                f"{directory}: holds {folder.name} of another optimizer or run: load it, save in another "
                "directory, or remove it"
            )
