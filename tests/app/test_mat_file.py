"""MATLAB 5 files against what scipy wrote, and files that nobody should write."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io

from data_files import RANDOM, random_bytes
from jointspar.training.data.mat_file import parse_mat

MAX_BYTES = 1 << 20


def saved(variables: dict, *, compressed: bool = False) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(name: bytes, shape: tuple[int, ...], data: bytes, data_type: int = 2, flags: int = 9) -> bytes:
    parts = element(6, struct.pack("<II", flags, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, parts + element(1, name) + element(data_type, data))


def compressed(content: bytes) -> bytes:
    packed = zlib.compress(content)
    return struct.pack("<II", 15, len(packed)) + packed


HEADER = saved({})


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_arrays_are_those_that_scipy_wrote(dtype: str, is_compressed: bool) -> None:
    expected = {"X": RANDOM.integers(0, 100, size=(3, 4, 5)).astype(dtype), "y": np.array([[7]], dtype)}
    arrays = parse_mat(saved(expected, compressed=is_compressed), max_bytes=MAX_BYTES)
    assert arrays.keys() == expected.keys()
    for name in expected:
        assert arrays[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(arrays[name], expected[name])


def test_what_is_no_real_numeric_array_is_left_out() -> None:
    variables = {
        "a": "text",
        "b": {"c": 1},
        "d": np.array([[1 + 2j]]),
        "e": np.array([[{}]], object),
        "f": np.eye(2),
    }
    assert list(parse_mat(saved(variables), max_bytes=MAX_BYTES)) == ["f"]


def test_big_endian_files_are_read() -> None:
    parts = struct.pack(">IIII", 6, 8, 9, 0) + struct.pack(">IIii", 5, 8, 1, 2) + b"\0\1\0\1x\0\0\0"
    content = HEADER[:124] + b"\x01\x00MI" + struct.pack(">II", 14, 48) + parts + b"\0\2\0\2\5\6\0\0"
    assert parse_mat(content, max_bytes=MAX_BYTES)["x"].tolist() == [[5, 6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a MATLAB 5 file"),
        (b"\x89HDF" + bytes(200), "not a MATLAB 5 file"),
        (HEADER + b"\0\0\0", "truncated"),
        (HEADER + struct.pack("<II", 14, 2**32 - 1), "truncated"),
        (HEADER + struct.pack("<II", (5 << 16) | 14, 0), "truncated"),
        (HEADER + bytes(8) * 200, "over 100 elements"),
        (HEADER + compressed(bytes(8) * 200), "over 100 elements"),
        (HEADER + compressed(bytes(MAX_BYTES + 1)), "over 1048576 bytes"),
        (HEADER + compressed(matrix(b"x", (2, 1), b"ab"))[:-4], "truncated"),
        (HEADER + struct.pack("<II", 15, 4) + b"junk", "cannot be read"),
        (HEADER + struct.pack("<II", 15, 8) + zlib.compress(b"abcdefghij")[:8], "is truncated"),
        (HEADER + compressed(compressed(matrix(b"x", (2, 1), b"ab"))), "not one array"),
        (HEADER + matrix(b"x", (3, 1), b"ab"), "has 2 bytes of data"),
        (HEADER + matrix(b"x", (-1, -2), b"ab"), "has 2 bytes of data"),
        (HEADER + matrix(b"x", (2**31 - 1,) * 9, b"ab"), "has 2 bytes of data"),
        (HEADER + matrix(b"x", (), b"ab"), "has 2 bytes of data"),
        (HEADER + matrix(b"x", (2, 1), b"ab", data_type=14), "variable 'x' is damaged"),
        (HEADER + matrix(b"x", (2, 1), b"ab") * 2, "is there twice"),
        (HEADER + element(14, element(6, bytes(8))), "no flags, dimensions and name"),
        (HEADER + element(14, b""), "no flags, dimensions and name"),
    ],
)
def test_damaged_and_hostile_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mat(content, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_random_damage_gives_arrays_or_a_value_error(is_compressed: bool) -> None:
    """scipy.io.loadmat does not survive this."""
    good = saved({"X": random_bytes(4, 4, 3, 2), "y": random_bytes(2, 1)}, compressed=is_compressed)
    for _ in range(2000):
        content = bytearray(good)
        for place in RANDOM.integers(0, len(content), size=3):
            content[place] = RANDOM.integers(0, 256)
        try:
            parse_mat(bytes(content[: RANDOM.integers(1, len(content) + 1)]), max_bytes=MAX_BYTES)
        except ValueError:
            continue
