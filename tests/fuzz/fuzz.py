"""Random input to what reads memory, headers and files that others wrote: every outcome is a result or a named error.

    python tests/fuzz/fuzz.py [--seconds 60 | --count 10000] [--seed 0] [--targets pack ...] [--add-to tests/faults]

Prints the seed of an input before the error that it caused; `--seed N --count 1` repeats it. A crash of the process is
reported by faulthandler, and by AddressSanitizer under `make test-sanitize`.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import numpy as np
import torch
from torch import nn

import jointspar as js
import report
from jointspar import ops
from jointspar.checkpoint_files import _sealed
from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op
from jointspar.errors import CheckpointError, DesyncError

REFUSALS = (TypeError, ValueError, OverflowError)
GUARD = 64  # bytes on either side of an output that nobody may write
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
LENGTHS = (0, 1, 2, 31, 32, 33, 100, 1025)
NUMBERS = (0, 1, -1, 3, 100, 2**31, 2**62, -(2**62), 2**63 - 1)


def some_array(r: random.Random) -> Any:
    """Mostly a usable vector, now and then anything else."""
    length = r.choice(LENGTHS)
    dtype = r.choice(DTYPES[:4]) if r.random() < 0.9 else r.choice(DTYPES)
    array = torch.zeros(2 * length + 8, dtype=dtype)[r.randrange(8) :][:length]
    kind = r.random()
    if kind < 0.75:
        return array
    numpy_array = np.zeros(length, dtype=r.choice(["f4", "f8", "f2", "i8", ">f4"]))
    readonly = numpy_array.copy()
    readonly.flags.writeable = False
    others = [
        None, 3, "text", array[::2], array.expand(3, length), torch.zeros(length, 2).T, torch.zeros(()),
        torch.zeros(length, device="meta"), numpy_array, readonly, numpy_array[::-1], [1.0] * min(length, 3),
        torch.zeros(1, dtype=array.dtype).as_strided((length,), (0,)), torch.zeros(length).to_sparse(),
    ]  # fmt: skip
    return r.choice(others)


def some_numbers(r: random.Random, arrays: list[Any]) -> Any:
    """A layout: mostly the true sizes."""
    sizes = [array.numel() if isinstance(array, torch.Tensor) else r.choice(LENGTHS) for array in arrays]
    if r.random() < 0.4 and sizes:
        sizes[r.randrange(len(sizes))] = r.choice(NUMBERS)
    if r.random() < 0.1:
        sizes.append(r.choice(NUMBERS))
    return r.choice([sizes, np.array(sizes, dtype=object), None, "sizes", sizes[::-1]]) if r.random() < 0.2 else sizes


def guarded(r: random.Random, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of so many elements with a pattern around it, and the whole memory."""
    dtype = r.choice(DTYPES[:4])
    guard = GUARD // dtype.itemsize
    whole = torch.full((length + 2 * guard,), 7.0, dtype=dtype)
    return whole[guard : guard + length], whole


def check_guard(whole: torch.Tensor) -> None:
    guard = GUARD // whole.dtype.itemsize
    assert (whole[:guard] == 7.0).all() and (whole[len(whole) - guard :] == 7.0).all(), "written beyond the output"


def pack(r: random.Random) -> None:
    grads = [some_array(r) for _ in range(r.randrange(5))]
    total = sum(grad.numel() for grad in grads if isinstance(grad, torch.Tensor))
    out, whole = guarded(r, total if r.random() < 0.8 else r.choice(LENGTHS))
    scales = r.choice([1.0, 0.5, float("nan"), -1.0, "x", [1.0] * len(grads), np.ones(3), None])
    with suppress(*REFUSALS):
        ops.pack_gradients(grads, scales, layout=some_numbers(r, grads), out=r.choice([out, out, None, some_array(r)]))
    check_guard(whole)


def unpack(r: random.Random) -> None:
    outs = [some_array(r) for _ in range(r.randrange(5))]
    view, whole = guarded(r, r.choice(LENGTHS))
    outs.append(view)
    total = sum(out.numel() for out in outs if isinstance(out, torch.Tensor))
    packed = torch.ones(total, dtype=r.choice(DTYPES[:4])) if r.random() < 0.8 else some_array(r)
    for call in (
        lambda: ops.unpack_gradients(packed, outs, add=r.random() < 0.5),
        lambda: ops.add_packed(view, r.choice([packed, some_array(r), view])),
        lambda: ops.squared_norms(r.choice([outs, packed]), layout=some_numbers(r, outs)),
    ):
        with suppress(*REFUSALS):
            call()
    check_guard(whole)


class Answering:
    """A transport whose other rank sends what `answer` makes of this rank's words."""

    is_closed = True  # nothing to finish at exit
    is_simulated = False
    rank, world_size = 0, 2

    def __init__(self, answer: Callable[[np.ndarray], np.ndarray]) -> None:
        self.answer = answer

    def start_headers(self, words: np.ndarray, *, what: str) -> Any:
        rows = np.stack([words, self.answer(words)])
        return type("Pending", (), {"wait": lambda self: rows})()


def headers(r: random.Random) -> None:
    """The other rank changes a few words from some header on, or sends noise."""
    left = r.randrange(4)

    def answer(words: np.ndarray) -> np.ndarray:
        nonlocal left
        left -= 1
        if left >= 0:
            return words
        changed = words.copy()
        for _ in range(r.choice([0, 1, 2, 20])):
            changed[r.randrange(words.size)] = r.choice([*NUMBERS, r.randrange(-(2**63), 2**63)])
        return changed

    num_layers = r.choice([0, 1, 3, 70])
    with suppress(DesyncError):
        agreed = Agreement(
            Answering(answer),  # type: ignore[arg-type]
            layer_names=["layer"] * num_layers,
            layer_hashes=list(range(num_layers)),
            settings={"seed": 0},
            num_values=num_layers + 1,
        )
        for step in range(3):
            agreed.post_plan(step, np.ones(num_layers, dtype=bool))
            assert agreed.wait_plan().shape == (2, num_layers)
            assert agreed.go(Op.EXCHANGE, step=step).shape == (2, num_layers + 1)
            agreed.compare_digests(step, np.zeros(num_layers + 1, dtype=np.int64))


@cache
def built() -> tuple[nn.Module, js.JointSparLARS]:
    """Every input is loaded into these two, for speed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, js.JointSparLARS(model.named_parameters(), comm=js.comm.local())


@cache
def sound_files() -> dict[str, bytes]:
    """The files of a checkpoint, by path."""
    model, optimizer = built()
    with tempfile.TemporaryDirectory() as name:
        folder = js.checkpoint.save(name, model=model, optimizer=optimizer)
        return {f"{folder.name}/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}


def load_or_refuse(files: dict[str, bytes]) -> bool:
    """Whether a checkpoint of these files loads; where it does not, nothing may have changed."""
    with tempfile.TemporaryDirectory() as name:
        for path, data in files.items():
            Path(name, path).parent.mkdir(exist_ok=True)
            Path(name, path).write_bytes(data)
        return _load_or_refuse(Path(name))


def _load_or_refuse(folder: Path) -> bool:
    model, optimizer = built()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            js.checkpoint.load(folder, model=model, optimizer=optimizer)
            built.cache_clear()  # so that an input's outcome depends on no other input
            return True
        except CheckpointError:
            unchanged = zip(before, model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in unchanged), "a refused checkpoint changed the weights"
            return False


def mutate(r: random.Random, data: bytes) -> bytes:
    content = bytearray(data)
    for _ in range(r.choice([1, 1, 3, 20])):
        place = r.randrange(len(content) + 1)
        choice = r.randrange(4)
        if choice == 0 and place < len(content):
            content[place] = r.randrange(256)
        elif choice == 1:
            del content[place : place + r.choice([1, 8, 10**6])]
        elif choice == 2:
            content[place:place] = r.randbytes(r.choice([1, 8, 100]))
        else:
            content[place:place] = content[: r.randrange(len(content) + 1)]
    return bytes(content)


def checkpoint(r: random.Random) -> None:
    """Damaged bytes: never loaded, unless they are the same bytes."""
    files = dict(sound_files())
    path = r.choice(list(files))
    data = files[path]
    files[path] = damaged = mutate(r, data)
    is_loaded = load_or_refuse(files)
    assert not is_loaded or damaged == data, "a damaged checkpoint was loaded"


def forged(r: random.Random) -> None:
    """Files whose digests are right, but whose content is not: loaded or refused, and no crash."""
    files = dict(sound_files())
    manifest_path = next(path for path in files if path.endswith("manifest.json"))
    manifest = json.loads(files[manifest_path])
    if r.random() < 0.5:
        key = r.choice(sorted(manifest))
        manifest[key] = r.choice([None, 0, -1, 2**70, "x", [], {}, [manifest[key]], {"x": manifest[key]}, 0.5])
    else:
        name = r.choice(sorted(manifest["files"]))
        path = str(Path(manifest_path).with_name(name))
        files[path] = mutate(r, files[path])
        manifest["files"][name] = hashlib.sha256(files[path]).hexdigest()
    files[manifest_path] = _sealed(manifest)
    load_or_refuse(files)


TARGETS = {"pack": pack, "unpack": unpack, "headers": headers, "checkpoint": checkpoint, "forged": forged}


def run(name: str, first_seed: int, is_over: Callable[[int], bool]) -> int:
    """One target with one seed after the other; how many inputs it had."""
    seed = first_seed
    while not is_over(seed - first_seed):
        try:
            TARGETS[name](random.Random(f"{name} {seed}"))
        except BaseException:
            print(f"fuzz: target {name}, seed {seed}", file=sys.stderr, flush=True)
            raise
        seed += 1
    return seed - first_seed


def add_to_report(folder: Path, name: str, inputs: int, seconds: float) -> None:
    known = report.read(folder).get(report.FUZZ, {}).get(name, {"inputs": 0, "seconds": 0.0, "commits": []})
    commits = sorted({*known["commits"], report.commit()})
    figures = {"inputs": known["inputs"] + inputs, "failures": 0, "seconds": round(known["seconds"] + seconds, 1)}
    report.add(folder, report.FUZZ, name, figures | {"commits": commits})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    length.add_argument("--count", type=int, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--add-to", type=Path, metavar="FOLDER", help="of a report: begin behind its inputs, and add")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    count, seconds = options.count, options.seconds / len(options.targets)
    for name in options.targets:
        known = report.read(options.add_to).get(report.FUZZ, {}).get(name, {}) if options.add_to else {}
        began = time.monotonic()
        is_over = partial(_is_over, count, began + seconds)
        inputs = run(name, options.seed + known.get("inputs", 0), is_over)
        if options.add_to:
            add_to_report(options.add_to, name, inputs, time.monotonic() - began)
        print(f"fuzz: {name}: no failure in {inputs} inputs", flush=True)
    return 0


def _is_over(count: int | None, end: float, done: int) -> bool:
    return done >= count if count is not None else time.monotonic() > end


if __name__ == "__main__":
    sys.exit(main())
