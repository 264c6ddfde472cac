"""Writes small datasets in their official formats, and makes the table of datasets agree with their sizes."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from jointspar.training.data.properties import PROPERTIES

RANDOM = np.random.default_rng(0)
CIFAR_NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
WNIDS = ["n01440764", "n02102040", "n03000684"]


def resize_table(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """The table says other sizes for one dataset, such as train_size=20."""
    monkeypatch.setitem(PROPERTIES, name, replace(PROPERTIES[name], **changes))


def random_bytes(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, size=shape, dtype=np.uint8)


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(path: Path, values: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_bytes(values)) if path.suffix == ".gz" else idx_bytes(values))


def write_mnist(folder: Path, *, suffix: str = "", num_train: int = 20, num_test: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", random_bytes(count, 28, 28))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))


def write_cifar10(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """The binary version, images uint8 [24, 3, 32, 32] in six files of four."""
    folder.mkdir(parents=True, exist_ok=True)
    records = np.hstack([labels[:, None], images.reshape(24, -1)])
    for k, name in enumerate(CIFAR_NAMES):
        (folder / f"{name}.bin").write_bytes(records[4 * k : 4 * k + 4].tobytes())


def write_cifar10_png(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    rows = images.transpose(0, 2, 3, 1).reshape(24, 1024, 3)
    for k, name in enumerate(CIFAR_NAMES):
        Image.fromarray(rows[4 * k : 4 * k + 4]).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(labels[:20].tolist()))
    (folder / "test_lables.json").write_text(json.dumps(labels[20:].tolist()))


def write_cifar100(path: Path, images: np.ndarray, coarse: np.ndarray, fine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.hstack([coarse[:, None], fine[:, None], images.reshape(len(images), -1)]).tobytes())


def write_svhn(path: Path, images: np.ndarray, digits: np.ndarray, *, compressed: bool = True) -> None:
    """images uint8 [n, 3, 32, 32], digits 0 to 9; in the file 0 is 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=compressed)


def picture_bytes(width: int = 40, height: int = 30, *, colour: int | None = None, kind: str = "JPEG") -> bytes:
    pixels = random_bytes(height, width, 3) if colour is None else np.full((height, width, 3), colour, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_class_folders(folder: Path, *, per_class: int = 4, num_test: int = 2) -> None:
    """Three classes; picture k of class c has the even colour 40 * c + 2 * k."""
    for split, count in (("train", per_class), ("val", num_test)):
        for c, wnid in enumerate(WNIDS):
            (folder / split / wnid).mkdir(parents=True)
            for k in range(count):
                (folder / split / wnid / f"{wnid}_{k}.JPEG").write_bytes(picture_bytes(colour=40 * c + 2 * k))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sample_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """Sample k has the colour 2 * k and the label k."""
    members = []
    for k in range(first, first + count):
        members += [(f"{k:06}.jpg", picture_bytes(colour=2 * k)), (f"{k:06}.cls", str(k).encode())]
    return members


def write_shards(folder: Path, *, train_sizes: tuple[int, ...] = (4, 4, 4)) -> None:
    """Training shards of these sizes, and test shards of 3 and 2 samples."""
    for split, sizes in (("train", train_sizes), ("val", (3, 2))):
        first = 0
        for k, size in enumerate(sizes):
            write_tar(folder / split / f"imagenet-{split}-{k:06}.tar", sample_members(first, size))
            first += size
