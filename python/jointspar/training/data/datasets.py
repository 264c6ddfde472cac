"""Datasets by name: which form is in a folder, and its training and test split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from jointspar.comm.hashing import stable_hash
from jointspar.training.data.augment import crop_and_flip, normalise
from jointspar.training.data.class_folders import PictureFiles, has_class_folders, load_class_folders
from jointspar.training.data.properties import PROPERTIES, DataFile, DatasetProperties, Form
from jointspar.training.data.readers import FORMATS, DatasetError, MissingPackageError, Part
from jointspar.training.data.shards import Shards, find_shards, load_shards

DATA_ROOT_VARIABLE = "JOINTSPAR_DATA"


@dataclass(frozen=True)
class InMemory:
    """A split as images uint8 [num_items, channels, size, size] and labels int64 [num_items]."""

    properties: DatasetProperties
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property  # of all ranks that one process plays
    def fingerprint(self) -> object:
        """Differs where ranks have different data."""
        return stable_hash([self.labels, self.images])

    def read(self, index: np.ndarray, key: tuple[int, ...] | None) -> torch.Tensor:
        """float32 [n, channels, size, size], normalised; augmented by random numbers of `key`, or for test without."""
        images = self.images[torch.from_numpy(index)]
        augmentation = self.properties.augmentation
        if key is not None and augmentation.padding:
            random = np.random.default_rng(key)
            images = crop_and_flip(images, random, padding=augmentation.padding, flips=augmentation.flips)
        return normalise(images, self.properties)


Indexed: TypeAlias = InMemory | PictureFiles  # any image can be read
Split: TypeAlias = Indexed | Shards


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of one kind: in memory, pictures in files, or shards."""

    name: str
    properties: DatasetProperties
    train: Split
    test: Split


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Read a dataset: into memory, or of ImageNet the names of its pictures or the sizes of its shards.

    name: a key of properties.PROPERTIES. data_dir: the folder that holds the files. None: $JOINTSPAR_DATA/<name>
    (without the variable ./data/<name>), else the system package's folder.
    Files that say how many items they hold may hold fewer than the official ones.
    Raises DatasetError (a ValueError): one line that says which file, what is wrong, what to do.
    """
    if name not in PROPERTIES:
        raise ValueError(f"dataset {name!r} is unknown: choose from {', '.join(PROPERTIES)}")
    properties = PROPERTIES[name]
    if data_dir is not None and is_packaged(properties):
        raise DatasetError(f"data_dir: {name} is not read from a folder, it is part of a package: leave it out")
    folder = Path(data_dir) if data_dir is not None else default_folder(name)
    try:
        form, folder = find_form(properties, folder)
        train, test = _LOADERS[form.kind](folder, properties, form)
    except DatasetError as error:
        raise DatasetError(f"{error}. For {name}: {remedy(properties)}") from error
    return Dataset(name, properties, train, test)


def is_packaged(properties: DatasetProperties) -> bool:
    """Whether a Python package holds it, and no folder."""
    return all(form.kind == "package" for form in properties.forms)


def default_folder(name: str) -> Path:
    """The folder that `load_dataset` reads when it is told none."""
    chosen = Path(os.environ.get(DATA_ROOT_VARIABLE) or "data") / name
    installed = Path(PROPERTIES[name].installed)
    is_known = os.path.isdir  # False of what may not be looked at, too
    return installed if PROPERTIES[name].installed and is_known(installed) and not is_known(chosen) else chosen


def remedy(properties: DatasetProperties) -> str:
    """What to do to have the dataset, in words."""
    return "; or ".join(form.remedy for form in properties.forms)


def find_form(properties: DatasetProperties, folder: Path) -> tuple[Form, Path]:
    """The form that a folder holds, the first one where there is nothing, and the folder of its files.

    Raises DatasetError where there is only a version that would have to be unpickled.
    """
    for form in properties.forms:
        for place in (folder, folder / form.subfolder):
            if _is_present(form, place):
                return form, place
    if found := [folder / name for name in properties.pickled if (folder / name).exists()]:
        raise DatasetError(
            f"{found[0]} is the Python version, which is pickled: reading it would run whatever code it holds; "
            "use the binary version"
        )
    return properties.forms[0], folder


def _is_present(form: Form, folder: Path) -> bool:
    if form.kind == "folders":
        return has_class_folders(folder)
    if form.kind == "shards":
        return bool(find_shards(folder, "train"))
    return any(find_file(folder, file).is_file() for file in form.files)


def find_file(folder: Path, file: DataFile) -> Path:
    """Where a file is, or should be: IDX files are read compressed as well."""
    path = folder / file.name
    compressed = path.with_name(path.name + ".gz")
    return compressed if file.format.startswith("idx") and compressed.is_file() and not path.is_file() else path


def read_part(folder: Path, file: DataFile, properties: DatasetProperties, form: Form) -> Part:
    """What one file holds. Raises DatasetError."""
    return FORMATS[file.format](find_file(folder, file), properties, properties.items_in(file, form))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 8 x 8 scans in a fixed order: images uint8 [n, 1, 32, 32], each pixel repeated, labels."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingPackageError("scikit-learn is not installed") from error
    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    images = images.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    order = np.random.RandomState(0).permutation(len(images))  # RandomState's stream is frozen: the split is fixed
    return images[order], digits.target[order]


def _load_package(folder: Path, properties: DatasetProperties, form: Form) -> tuple[InMemory, InMemory]:
    images, labels = load_digits()
    first = properties.train_size
    train = _in_memory(properties, images[:first], labels[:first])
    return train, _in_memory(properties, images[first:], labels[first:])


def _load_files(folder: Path, properties: DatasetProperties, form: Form) -> tuple[InMemory, InMemory]:
    train, test = (_load_split(folder, properties, form, split) for split in ("train", "test"))
    return train, test


def _load_split(folder: Path, properties: DatasetProperties, form: Form, split: str) -> InMemory:
    files = [file for file in form.files if file.split == split]
    parts = [read_part(folder, file, properties, form) for file in files]
    images = np.concatenate([part.images for part in parts if part.images is not None])
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    if len(images) != len(labels):
        raise DatasetError(f"{find_file(folder, files[-1])} holds {len(labels)} labels for {len(images)} images")
    return _in_memory(properties, images, labels)


def _in_memory(properties: DatasetProperties, images: np.ndarray, labels: np.ndarray) -> InMemory:
    return InMemory(properties, torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def _load_folders(folder: Path, properties: DatasetProperties, form: Form) -> tuple[PictureFiles, PictureFiles]:
    return load_class_folders(folder, properties)


def _load_shards(folder: Path, properties: DatasetProperties, form: Form) -> tuple[Shards, Shards]:
    return load_shards(folder, properties)


_LOADERS: dict[str, Callable[[Path, DatasetProperties, Form], tuple[Split, Split]]] = {
    "package": _load_package,
    "files": _load_files,
    "folders": _load_folders,
    "shards": _load_shards,
}
