"""Pictures in one folder per class: train/<class>/*.JPEG and val/<class>/*.JPEG, decoded when they are needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from jointspar.comm.hashing import stable_hash
from jointspar.training.data.augment import normalise
from jointspar.training.data.pictures import MAX_PICTURE_BYTES, SUFFIXES, decode_batch
from jointspar.training.data.properties import DatasetProperties
from jointspar.training.data.readers import DatasetError, MissingError, read_bytes

SPLIT_FOLDERS = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class PictureFiles:
    """A split on disk: files, and labels int64 [num_items]."""

    properties: DatasetProperties
    folder: Path
    files: list[str]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.files)

    @cached_property  # of all ranks that one process plays
    def fingerprint(self) -> object:
        """Differs where ranks have different names: to read all pictures for it would take minutes."""
        inside = len(str(self.folder))
        return stable_hash([self.labels, "\0".join([file[inside:] for file in self.files])])

    def read(self, index: np.ndarray, key: tuple[int, ...] | None) -> torch.Tensor:
        """float32 [n, 3, size, size], normalised; augmented by random numbers of `key`, or for test without."""
        sources = [partial(read_picture_file, self.files[item]) for item in index.tolist()]
        return normalise(decode_batch(sources, self.properties, key), self.properties)


def has_class_folders(folder: Path) -> bool:
    """Whether there is a training folder with folders in it."""
    train = folder / SPLIT_FOLDERS["train"]
    return train.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(train))


def load_class_folders(folder: Path, properties: DatasetProperties) -> tuple[PictureFiles, PictureFiles]:
    """The training and the test split; the label is the class folder's place among the sorted training folders.

    Raises DatasetError.
    """
    classes = class_names(folder / SPLIT_FOLDERS["train"])
    if len(classes) > properties.num_classes:
        raise DatasetError(f"{folder / 'train'} has {len(classes)} class folders, expected {properties.num_classes}")
    train, test = (_list_split(folder / name, classes, properties) for name in SPLIT_FOLDERS.values())
    return train, test


def class_names(folder: Path) -> list[str]:
    """The folders in a split's folder, sorted. Raises DatasetError where there is none."""
    if not folder.is_dir():
        raise MissingError(f"{folder} is missing")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DatasetError(f"{folder} has no class folders: the pictures have to be sorted into {folder}/<wnid>")
    return names


def _list_split(folder: Path, classes: list[str], properties: DatasetProperties) -> PictureFiles:
    numbers = {name: number for number, name in enumerate(classes)}
    files: list[str] = []
    labels: list[int] = []
    for name in class_names(folder):
        if name not in numbers:
            raise DatasetError(f"{folder / name} is a class without training pictures")
        seen = (entry for entry in os.scandir(folder / name) if not entry.name.startswith("."))  # as macOS leaves them
        pictures = sorted(entry.path for entry in seen if entry.name.lower().endswith(SUFFIXES))
        if not pictures:
            raise DatasetError(f"{folder / name} has no pictures ({', '.join(SUFFIXES)})")
        files += pictures
        labels += [numbers[name]] * len(pictures)
    return PictureFiles(properties, folder, files, torch.tensor(labels))


def read_picture_file(path: str) -> tuple[str, bytes]:
    """The name and the content of a picture, a source for decode_batch. Raises DatasetError."""
    return path, read_bytes(Path(path), MAX_PICTURE_BYTES)
