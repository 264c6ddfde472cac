"""Hashes that are the same on every rank, machine and run: what headers compare."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from enum import Enum
from hashlib import blake2b

import numpy as np
import torch

from jointspar.comm.transport import as_bytes


def stable_hash(value: object) -> int:
    """A hash in [0, 2**63) of plain data: numbers, strings, None, sequences, dicts in any order, arrays, dataclasses.

    1, 1.0 and True hash differently, an array as its dtype, shape and bytes. Raises TypeError for anything else, since
    a repr with an address in it would differ between ranks.
    """
    digest = blake2b(digest_size=8)
    for part in _parts(value):
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        yield from _array_parts(str(value.dtype), value.shape, as_bytes(value))
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of Python objects has no stable hash")
        yield from _array_parts(value.dtype.str, value.shape, np.ascontiguousarray(value))
    elif isinstance(value, (np.bool_, np.integer, np.floating)):
        yield from _parts(value.item())
    elif isinstance(value, Enum):
        yield from (b"enum", type(value).__name__.encode(), value.name.encode())
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield from (type(value).__name__.encode(), repr(value).encode())
    elif isinstance(value, bytes):
        yield from (b"bytes", value)
    else:
        yield from _container_parts(value)


def _array_parts(dtype: str, shape: tuple[int, ...], memory: np.ndarray) -> Iterator[bytes]:
    yield from (b"array", dtype.encode(), repr(tuple(shape)).encode(), memory.tobytes())


def _container_parts(value: object) -> Iterator[bytes]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: Sequence[object] = [[field.name, getattr(value, field.name)] for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        items = sorted([stable_hash(key), stable_hash(entry)] for key, entry in value.items())
    elif isinstance(value, (list, tuple)):
        items = value
    else:
        raise TypeError(f"a {type(value).__name__} has no stable hash: use numbers, strings, sequences or arrays")
    kind = "sequence" if isinstance(value, (list, tuple)) else type(value).__name__
    yield from (kind.encode(), str(len(items)).encode())
    for item in items:
        yield from _parts(item)
