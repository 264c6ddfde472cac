"""The official file formats, written here byte by byte: good, absent, truncated, damaged."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jointspar.training.readers import (
    DatasetError,
    read_cifar_bin,
    read_cifar_png,
    read_idx,
    read_labels_idx,
    read_labels_json,
)

RANDOM = np.random.default_rng(0)


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def random_bytes(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, size=shape, dtype=np.uint8)


def test_idx_gives_the_values_in_order(tmp_path: Path) -> None:
    images = random_bytes(3, 5, 4)
    (tmp_path / "images").write_bytes(idx_bytes(images))
    np.testing.assert_array_equal(read_idx(tmp_path / "images", ndim=3), images)


def test_idx_gzip_gives_the_same(tmp_path: Path) -> None:
    images = random_bytes(3, 5, 4)
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx_bytes(images)))
    np.testing.assert_array_equal(read_idx(tmp_path / "images.gz", ndim=3), images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (idx_bytes(random_bytes(2, 3, 3))[:10], "truncated"),
        (idx_bytes(random_bytes(2, 3, 3))[:-1], "holds 17"),
        (idx_bytes(random_bytes(2, 3, 3)) + b"x", "holds 19"),
        (b"\0\0\x0d\x03" + bytes(40), "not an IDX file"),
        (idx_bytes(random_bytes(20, 2)), "not an IDX file"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "damaged"),
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        read_idx(path, ndim=3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [1, 8, 30])
def test_truncated_gzip_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx_bytes(random_bytes(50)))[:-cut])
    with pytest.raises(DatasetError, match="cannot be read"):
        read_idx(path, ndim=1)


def test_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DatasetError, match=r"labels\.gz cannot be read"):
        read_idx(tmp_path / "labels.gz", ndim=1)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for read in (lambda path: read_idx(path, ndim=3), read_cifar_bin, read_cifar_png):
        with pytest.raises(DatasetError, match="nowhere is missing"):
            read(tmp_path / "nowhere")


def test_label_out_of_range_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(idx_bytes(np.array([1, 2, 10], np.uint8)))
    with pytest.raises(DatasetError, match="label 10"):
        read_labels_idx(tmp_path / "labels", num_items=3, num_classes=10)


def test_label_count_must_be_that_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(idx_bytes(np.array([1, 2, 3], np.uint8)))
    with pytest.raises(DatasetError, match="3 labels for 4 images"):
        read_labels_idx(tmp_path / "labels", num_items=4, num_classes=10)


def test_cifar_bin_gives_planes_and_labels(tmp_path: Path) -> None:
    images, labels = random_bytes(5, 3, 32, 32), np.array([9, 0, 3, 1, 2], np.uint8)
    (tmp_path / "batch.bin").write_bytes(np.hstack([labels[:, None], images.reshape(5, -1)]).tobytes())
    got_images, got_labels = read_cifar_bin(tmp_path / "batch.bin", num_items=5)
    np.testing.assert_array_equal(got_images, images)
    np.testing.assert_array_equal(got_labels, labels)


def test_cifar_bin_of_a_wrong_size_is_named(tmp_path: Path) -> None:
    (tmp_path / "batch.bin").write_bytes(bytes(3073 * 5 - 1))
    with pytest.raises(DatasetError, match="15364 bytes, 5 records need 15365"):
        read_cifar_bin(tmp_path / "batch.bin", num_items=5)


def test_cifar_png_gives_planes(tmp_path: Path) -> None:
    images = random_bytes(4, 3, 32, 32)
    rows = images.transpose(0, 2, 3, 1).reshape(4, 1024, 3)
    Image.fromarray(rows).save(tmp_path / "batch.png")
    np.testing.assert_array_equal(read_cifar_png(tmp_path / "batch.png", num_items=4), images)


def test_cifar_png_of_another_shape_is_named(tmp_path: Path) -> None:
    Image.fromarray(random_bytes(4, 64, 3)).save(tmp_path / "batch.png")
    with pytest.raises(DatasetError, match="64 x 4 RGB, expected 1024 x 4"):
        read_cifar_png(tmp_path / "batch.png", num_items=4)


@pytest.mark.parametrize("keep", [0, 20, 1000])
def test_truncated_png_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "batch.png"
    Image.fromarray(random_bytes(4, 1024, 3)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match="damaged or not a PNG"):
        read_cifar_png(path, num_items=4)


def test_json_labels_are_read(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps([3, 0, 9]))
    assert read_labels_json(tmp_path / "labels.json", num_items=3, num_classes=10).tolist() == [3, 0, 9]


@pytest.mark.parametrize(
    "content", ["", "[1, 2", '{"a": 1}', "[1, 2.5, 3]", "[1, true, 3]", "[1, -1, 3]", "[" * 100_000]
)
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DatasetError, match=r"labels\.json"):
        read_labels_json(tmp_path / "labels.json", num_items=3, num_classes=10)
