"""The official file formats, written here byte by byte: good, absent, truncated, damaged."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from data_files import idx_bytes, random_bytes, write_cifar100, write_svhn
from jointspar.training.data.properties import PROPERTIES
from jointspar.training.data.readers import (
    FORMATS,
    DatasetError,
    read_bytes,
    read_cifar_bin,
    read_cifar_png,
    read_idx,
    read_labels_json,
    read_svhn,
)


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
    for read in (lambda path: read_idx(path, ndim=3), read_svhn, lambda path: read_cifar_png(path, num_items=1)):
        with pytest.raises(DatasetError, match="nowhere is missing"):
            read(tmp_path / "nowhere")


def test_label_out_of_range_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(idx_bytes(np.array([1, 2, 10], np.uint8)))
    with pytest.raises(DatasetError, match="label 10"):
        FORMATS["idx-labels"](tmp_path / "labels", PROPERTIES["mnist"], 3)


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
    assert read_labels_json(tmp_path / "labels.json", num_classes=10).tolist() == [3, 0, 9]


@pytest.mark.parametrize(
    "content", ["", "[1, 2", '{"a": 1}', "[1, 2.5, 3]", "[1, true, 3]", "[1, -1, 3]", "[" * 100_000]
)
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DatasetError, match=r"labels\.json"):
        read_labels_json(tmp_path / "labels.json", num_classes=10)


@pytest.mark.parametrize(("coarse", "fine", "message"), [(20, 0, "label 20"), (0, 100, "label 100")])
def test_cifar100_labels_out_of_range_are_named(tmp_path: Path, coarse: int, fine: int, message: str) -> None:
    path = tmp_path / "train.bin"
    write_cifar100(path, random_bytes(1, 3, 32, 32), np.array([coarse], np.uint8), np.array([fine], np.uint8))
    with pytest.raises(DatasetError, match=f"train.bin is damaged: {message}"):
        read_cifar_bin(path, num_items=1, classes=(20, 100))


def test_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    (tmp_path / "labels.gz").write_bytes(gzip.compress(bytes(1 << 24)))  # 16 kB
    with pytest.raises(DatasetError, match="too large for a data file"):
        read_bytes(tmp_path / "labels.gz", max_bytes=1 << 20)


def mat_file(tmp_path: Path, **variables: np.ndarray) -> Path:
    scipy.io.savemat(tmp_path / "train_32x32.mat", variables)
    return tmp_path / "train_32x32.mat"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"X": random_bytes(32, 32, 3, 2)}, r"y \(0,\)"),
        ({"y": random_bytes(2, 1)}, r"X is float64 \(0,\)"),
        ({"X": random_bytes(32, 32, 3, 2), "y": random_bytes(3, 1)}, r"y \(3, 1\)"),
        ({"X": random_bytes(28, 28, 3, 2), "y": random_bytes(2, 1)}, "not SVHN's cropped digits"),
        ({"X": np.ones((32, 32, 3, 2)) / 3, "y": random_bytes(2, 1)}, "X is float64"),
        ({"X": random_bytes(32, 32, 3, 2), "y": np.array([[1], [11]])}, "labels are from 1 to 11"),
        ({"X": random_bytes(32, 32, 3, 2), "y": np.array([[0], [1]])}, "labels are from 0 to 1"),
        ({"X": random_bytes(32, 32, 3, 2), "y": np.array([[1.5], [2]])}, "labels are from 1.5"),
        ({"X": random_bytes(32, 32, 3, 2), "y": np.array([[np.nan], [2]])}, "labels are from nan"),
    ],
)
def test_mat_file_that_is_not_svhn_is_named(tmp_path: Path, variables: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as error:
        read_svhn(mat_file(tmp_path, **variables))
    assert "train_32x32.mat" in str(error.value)


def test_svhn_labels_may_be_doubles_as_matlab_writes_them(tmp_path: Path) -> None:
    labels = np.array([[10.0], [3.0]])
    assert read_svhn(mat_file(tmp_path, X=random_bytes(32, 32, 3, 2), y=labels))[1].tolist() == [0, 3]


@pytest.mark.parametrize("keep", [0, 100, 128, 132, 140, 500, -1])
def test_truncated_mat_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "train_32x32.mat"
    write_svhn(path, random_bytes(2, 3, 32, 32), np.array([1, 2]))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"train_32x32\.mat is "):
        read_svhn(path)
