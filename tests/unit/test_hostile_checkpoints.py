"""Checkpoints of strangers, whose digests are right: no file outside is opened, nothing runs, nothing half loads."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import jointspar as js
from jointspar.checkpoint_files import _sealed
from jointspar.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:passing over")
Run = tuple[nn.Module, js.JointSparLARS, Any]


def make() -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(lag=1, distribution="bandit"))
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def train(run: Run) -> None:
    model, optimizer, scheduler = run
    optimizer.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    scheduler.step()


def everything(run: Run) -> str:
    model, optimizer, scheduler = run
    return f"{model.state_dict()}{optimizer.state_dict()}{scheduler.state_dict()}{torch.get_rng_state().sum()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = make()
    for _ in range(3):
        train(run)
    model, optimizer, scheduler = run
    return js.checkpoint.save(tmp_path / "run", model=model, optimizer=optimizer, scheduler=scheduler)


def load(folder: Path, run: Run) -> None:
    js.checkpoint.load(folder.parent, model=run[0], optimizer=run[1], scheduler=run[2])


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change the manifest, and make every digest right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(manifest)
    path.write_bytes(_sealed(manifest))


def in_manifest(**values: Any) -> Callable[[Path], None]:
    return lambda folder: sign(folder, lambda manifest: manifest.update(values))


def files_also(name: str) -> Callable[[Path], None]:
    return lambda folder: sign(folder, lambda manifest: manifest["files"].update({name: "0" * 64}))


def file_instead(name: str) -> Callable[[Path], None]:
    """Another name in the place of the ranks' own."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("rank-0.safetensors")

    return lambda folder: sign(folder, change)


def in_scheduler(**values: Any) -> Callable[[Path], None]:
    return lambda folder: sign(folder, lambda manifest: manifest["scheduler"].update(values))


def number(kind: Any, value: Any) -> dict[str, Any]:
    """As a tensor of one element, or a NumPy scalar, stands in a manifest."""
    return {"__pairs__": [], "__number__": [kind, value]}


def in_group(**values: Any) -> Callable[[Path], None]:
    return lambda folder: sign(folder, lambda manifest: manifest["param_groups"][0].update(values))


def in_extra(value: Any) -> Callable[[Path], None]:
    return in_manifest(extra={"it": value})


def bytes_of(name: str, content: bytes) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (folder / name).write_bytes(content)
        sign(folder)

    return forge


def tensor_of(tensor: str, value: torch.Tensor | None, file: str = "rank-0.safetensors") -> Callable[[Path], None]:
    """A tensor in the place of one that was saved; None: left out."""

    def forge(folder: Path) -> None:
        tensors = load_file(folder / file)
        assert tensor in tensors
        del tensors[tensor]
        save_file(tensors | ({} if value is None else {tensor: value}), folder / file)
        sign(folder)

    return forge


def link_to(target: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (folder / "rank-0.safetensors").unlink()
        (folder / "rank-0.safetensors").symlink_to(target)

    return forge


def pipe(name: str) -> Callable[[Path], None]:
    """Nobody ever writes into it: reading it would wait for ever."""

    def forge(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return forge


def huge_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 40)  # a hole, which takes no room on disk


def manifest_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(text) and None


def header(fields: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


PICKLE = b"cos\nsystem\n(S'touch ran'\ntR."
TWO = torch.zeros(2, dtype=torch.float64)  # layers

HOSTILE: dict[str, Callable[[Path], None]] = {
    "a name that leads out": files_also("../../secret"),
    "an absolute name": files_also("/etc/passwd"),
    "a device": files_also("/dev/zero"),
    "a name that leads out instead": file_instead("../../secret"),
    "a device instead": file_instead("/dev/zero"),
    "a pipe": pipe("rank-0.safetensors"),
    "a pipe as manifest": pipe("manifest.json"),
    "a link to a device": link_to("/dev/zero"),
    "a link out": link_to("../../secret"),
    "no files": in_manifest(files={}),
    "files as a list": in_manifest(files=["shared.safetensors", "rank-0.safetensors"]),
    "one file left out": lambda folder: sign(folder, lambda manifest: manifest["files"].pop("shared.safetensors")),
    "endless ranks": in_manifest(world_size=2**70),
    "ranks below 0": in_manifest(world_size=-1),
    "ranks of another type": in_manifest(world_size=True),
    "another format": in_manifest(format=2),
    "a huge manifest": huge_manifest,
    "a deep manifest": manifest_text("[" * 100_000),
    "a manifest of a number": manifest_text("3"),
    "a manifest of a long number": manifest_text('{"format": ' + "9" * 10_000 + "}"),
    "groups of another kind": in_manifest(param_groups=3),
    "a run of another kind": in_manifest(run=3),
    "a run of no number": in_manifest(run="../../etc/passwd"),
    "a run beyond 63 bits": in_manifest(run="f" * 16),
    "a group without rates": in_manifest(param_groups=[{"params": [0, 1, 2, 3]}]),
    "deep extra": in_manifest(extra=json.loads("[" * 300 + "]" * 300)),
    "extra of another kind": in_manifest(extra=3),
    "pairs of another kind": in_manifest(extra={"__pairs__": 3}),
    "groups whose members are tensors": lambda folder: sign(
        folder, lambda manifest: manifest["param_groups"][0].update(params=[number("torch.int64", i) for i in range(4)])
    ),
    "a rate of NaN": in_group(lr=number("torch.float32", float("nan"))),
    "a rate of whole numbers": in_group(lr=number("torch.int64", 1)),
    "a rate of two numbers": in_group(lr=number("torch.float32", [0.1, 0.1])),
    "a rate of none": in_group(lr=number("torch.float32", [])),
    "a switch in a tensor": in_group(nesterov=number("torch.bool", True)),
    "a number of text": in_extra(number("torch.float32", "0.1")),
    "a number of text for NumPy": in_extra(number("numpy.float32", "0.1")),
    "numbers for NumPy": in_extra(number("numpy.float32", [0.1, 0.1])),
    "a number of pairs": in_extra(number("torch.float32", {"__pairs__": []})),
    "a number of nothing": in_extra(number("torch.float32", None)),
    "a number of lists of other lengths": in_extra(number("torch.float32", [[1.0], [1.0, 2.0]])),
    "a number of too many dimensions": in_extra(number("torch.float32", json.loads("[" * 200 + "1.0" + "]" * 200))),
    "a number beyond its kind": in_extra(number("torch.int64", 2**80)),
    "a number beyond all kinds": in_extra(number("torch.float64", 10**2000)),
    "a number of an unknown kind": in_extra(number("torch.Tensor", 1.0)),
    "a number of a kind of another kind": in_extra(number(["torch.float32"], 1.0)),
    "a number of three parts": in_extra({"__pairs__": [], "__number__": ["torch.float32", 1.0, 2.0]}),
    "a number in another place": in_extra({"__pairs__": [], "__number__": 3}),
    "a number with pairs": in_extra({"__pairs__": [], "__number__": ["torch.float32", 1.0], "more": 1}),
    "extra that is a number": in_manifest(extra=number("torch.float32", 1.0)),
    "a scheduler of another kind": in_manifest(scheduler=[1]),
    "a scheduler without its lambdas": lambda folder: sign(
        folder, lambda manifest: manifest["scheduler"].pop("lr_lambdas")
    ),
    "a scheduler's lambdas of another kind": in_scheduler(lr_lambdas=3),
    "a pickle": bytes_of("shared.safetensors", PICKLE),
    "nothing": bytes_of("shared.safetensors", b""),
    "a header beyond the file": bytes_of("shared.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "a header that is no JSON": bytes_of("shared.safetensors", struct.pack("<Q", 2) + b"[["),
    "offsets beyond the file": bytes_of("shared.safetensors", header({"a": f32(0, 2**40, [2**38])})),
    "offsets below 0": bytes_of("shared.safetensors", header({"a": f32(-4, 0, [1])})),
    "a shape that overflows": bytes_of("shared.safetensors", header({"a": f32(0, 4, [2**32, 2**32])}, bytes(4))),
    "tensors that overlap": bytes_of(
        "shared.safetensors", header({"a": f32(0, 4, [1]), "b": f32(0, 4, [1])}, bytes(4))
    ),
    "no weight": tensor_of("model.0.weight", None, "shared.safetensors"),
    "a weight of another shape": tensor_of("model.0.weight", torch.ones(3, 4), "shared.safetensors"),
    "no momentum": tensor_of("momentum.0", None, "shared.safetensors"),
    "a momentum of another shape": tensor_of("momentum.0", torch.ones(1), "shared.safetensors"),
    "a step below 0": tensor_of("counters", torch.tensor([-1, 0])),
    "a step beyond all": tensor_of("counters", torch.tensor([2**62, 0])),
    "one counter": tensor_of("counters", torch.tensor([1])),
    "skipped below 0": tensor_of("counters", torch.tensor([3, -1])),
    "random state of another kind": tensor_of("random_state", torch.zeros(7)),
    "probabilities of 0": tensor_of("distribution.probabilities", TWO),
    "probabilities above 1": tensor_of("distribution.probabilities", TWO + 1.5),
    "probabilities of NaN": tensor_of("distribution.probabilities", TWO / 0),
    "probabilities of too many layers": tensor_of("distribution.probabilities", torch.ones(3, dtype=torch.float64)),
    "nothing may be drawn": tensor_of("distribution.eligible", torch.zeros(2, dtype=torch.bool)),
    "counts below 0": tensor_of("distribution.norm_count", torch.tensor([-5, 1])),
    "norms below 0": tensor_of("distribution.norm_ema", TWO - 1),
    "a bound below 0": tensor_of("distribution.gradient_bound", torch.tensor(-1.0, dtype=torch.float64)),
    "a lesson of too many layers": tensor_of("lesson.counts", torch.ones(3, dtype=torch.int64)),
    "a lesson of negative norms": tensor_of("lesson.local", TWO - 1),
    "a lesson of negative norms beside NaN": lambda folder: [
        forge(folder) for forge in (tensor_of("lesson.local", TWO / 0), tensor_of("lesson.mean", TWO - 1))
    ],
    "a lesson of impossible draws": tensor_of("lesson.drawn", TWO + 2),
    "flags of too many parameters": tensor_of("trainable", torch.ones(5, dtype=torch.bool)),
    "flags of two dimensions": tensor_of("trainable", torch.ones(4, 1, dtype=torch.bool)),
    "carried norms of another kind": tensor_of("update.norms", torch.ones(4)),
    "a carried count below 0": tensor_of("update.steps", torch.tensor(-1)),
}


def test_there_are_many() -> None:
    assert len(HOSTILE) >= 50


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.filterwarnings("ignore:refusing a checkpoint")
def test_a_hostile_checkpoint_is_refused_and_changes_nothing(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent.parent / "secret").write_bytes((folder / "rank-0.safetensors").read_bytes())
    HOSTILE[what](folder)
    run = make()
    before, opened, original = everything(run), [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *more, **named: opened.append(path) or original(path, *more, **named)
    )
    with pytest.raises(CheckpointError):
        load(folder, run)
    assert everything(run) == before
    assert {path.parent for path in opened} <= {folder}
    monkeypatch.undo()
    train(run)


def test_what_they_are_forged_from_loads(folder: Path) -> None:
    run = make()
    sign(folder)
    load(folder, run)
    train(run)


def test_a_checkpoint_that_is_a_link_is_loaded(folder: Path, tmp_path: Path) -> None:
    """A run's folder may stand on another disk."""
    (tmp_path / "elsewhere").symlink_to(folder.parent)
    js.checkpoint.load(tmp_path / "elsewhere", model=make()[0], optimizer=make()[1])


def test_extra_that_no_manifest_may_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match="extra"):
        js.checkpoint.save(tmp_path / "new", model=model, optimizer=optimizer, extra={"text": "x" * (1 << 25)})
    assert not (tmp_path / "new").exists()
