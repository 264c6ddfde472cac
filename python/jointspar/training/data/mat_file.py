"""Reader of MATLAB 5 files, for plain numeric arrays alone.

scipy.io.loadmat reads all that the format has, but crashes the process on some damaged files (scipy 1.17.1); this one
reads little and trusts nothing. The format is in MathWorks' "MAT-File Format".
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15
_INT8, _INT32, _UINT32 = 1, 5, 6
_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC_CLASSES = range(6, 16)  # double to uint64
_COMPLEX_FLAG = 0x0800
_MAX_ELEMENTS = 100  # of a file or an array: the reader's own lists must stay small


class _Element(NamedTuple):
    type: int
    data: memoryview


def parse_mat(content: bytes, *, max_bytes: int) -> dict[str, np.ndarray]:
    """The real numeric arrays of a MATLAB 5 file, by name, in the order of their dimensions; others are left out.

    Arrays have the dtype in which they are stored (MATLAB narrows what fits). max_bytes: of one decompressed variable.
    Raises ValueError that says what is wrong.
    """
    marker = content[126:_HEADER_BYTES]
    if len(content) < _HEADER_BYTES or marker not in (b"IM", b"MI"):
        raise ValueError("not a MATLAB 5 file")
    order = "<" if marker == b"IM" else ">"
    arrays: dict[str, np.ndarray] = {}
    for element in _elements(memoryview(content)[_HEADER_BYTES:], order):
        if element.type == _COMPRESSED:
            element = _inflate(element, order, max_bytes)
        if element.type == _MATRIX and (found := _parse_matrix(element.data, order)):
            name, array = found
            if name in arrays:
                raise ValueError(f"variable {name!r} is there twice")
            arrays[name] = array
    return arrays


def _elements(content: memoryview, order: str) -> list[_Element]:
    """Consecutive elements: type and length, 4 bytes each, then the data up to a multiple of 8 bytes.

    Compressed ones are not padded; data of up to 4 bytes stand in the place of the length.
    """
    elements: list[_Element] = []
    start = 0
    while start < len(content):
        if len(content) - start < 8:
            raise ValueError("truncated")
        if len(elements) == _MAX_ELEMENTS:
            raise ValueError(f"over {_MAX_ELEMENTS} elements")
        kind, size = struct.unpack_from(f"{order}II", content, start)
        begin, padding = start + 8, 0 if kind == _COMPRESSED else -size % 8
        if kind >> 16:  # a short one
            kind, size, begin, padding = kind & 0xFFFF, kind >> 16, start + 4, 4 - (kind >> 16)
        if padding < 0 or begin + size > len(content):
            raise ValueError("truncated")
        elements.append(_Element(kind, content[begin : begin + size]))
        start = begin + size + padding
    return elements


def _inflate(element: _Element, order: str, max_bytes: int) -> _Element:
    try:
        inflater = zlib.decompressobj()
        content = inflater.decompress(element.data, max_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"a compressed variable cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise ValueError(f"a compressed variable has over {max_bytes} bytes")
    if not inflater.eof:
        raise ValueError("a compressed variable is truncated")
    inner = _elements(memoryview(content), order)
    if len(inner) != 1 or inner[0].type != _MATRIX:
        raise ValueError("a compressed variable is not one array")
    return inner[0]


def _parse_matrix(content: memoryview, order: str) -> tuple[str, np.ndarray] | None:
    """Name and values of an array; None for what is no real numeric array."""
    parts = _elements(content, order)
    if [part.type for part in parts[:3]] != [_UINT32, _INT32, _INT8] or len(parts[0].data) != 8:
        raise ValueError("an array has no flags, dimensions and name")
    flags = struct.unpack_from(f"{order}I", parts[0].data)[0]
    if flags & 0xFF not in _NUMERIC_CLASSES or flags & _COMPLEX_FLAG:
        return None
    name = bytes(parts[2].data).decode("latin-1")
    if len(parts) != 4 or parts[3].type not in _DTYPES or len(parts[1].data) % 4:
        raise ValueError(f"variable {name!r} is damaged")
    dtype = np.dtype(order + _DTYPES[parts[3].type])
    shape = np.frombuffer(parts[1].data, f"{order}i4").tolist()
    if min(shape, default=-1) < 0 or math.prod(shape) * dtype.itemsize != len(parts[3].data):
        raise ValueError(f"variable {name!r} of shape {tuple(shape)} has {len(parts[3].data)} bytes of data")
    return name, np.frombuffer(parts[3].data, dtype).reshape(shape, order="F")
