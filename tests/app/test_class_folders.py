"""Folders of pictures, one per class."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_files import WNIDS, picture_bytes, resize_table, write_class_folders, write_shards
from jointspar.training.data.class_folders import PictureFiles
from jointspar.training.data.datasets import load_dataset
from jointspar.training.data.readers import DatasetError
from jointspar.training.data.shards import Shards


def test_labels_are_places_among_the_sorted_training_folders(tmp_path: Path) -> None:
    write_class_folders(tmp_path, per_class=2, num_test=1)
    (tmp_path / "val" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").unlink()
    (tmp_path / "val" / WNIDS[0]).rmdir()
    (tmp_path / "train" / WNIDS[1] / "notes.txt").write_text("no picture")
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / WNIDS[1] / f"._{WNIDS[1]}_0.JPEG").write_bytes(b"what macOS leaves beside a file")
    dataset = load_dataset("imagenet", tmp_path)
    assert isinstance(dataset.train, PictureFiles)
    assert isinstance(dataset.test, PictureFiles)
    assert [Path(file).name for file in dataset.train.files[:3]] == [
        f"{WNIDS[0]}_0.JPEG", f"{WNIDS[0]}_1.JPEG", f"{WNIDS[1]}_0.JPEG",
    ]  # fmt: skip
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [1, 2]


def test_a_hidden_folder_beside_shards_makes_no_class_folders(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "train" / ".cache").mkdir()
    assert isinstance(load_dataset("imagenet", tmp_path).train, Shards)


def test_class_without_training_pictures_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "val" / "n09999999").mkdir()
    with pytest.raises(DatasetError, match="n09999999 is a class without training pictures"):
        load_dataset("imagenet", tmp_path)


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "train" / "n09999999").mkdir()
    with pytest.raises(DatasetError, match="n09999999 has no pictures"):
        load_dataset("imagenet", tmp_path)


def test_more_classes_than_the_data_set_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize_table(monkeypatch, "imagenet", num_classes=2)
    write_class_folders(tmp_path)
    with pytest.raises(DatasetError, match="3 class folders, expected 2"):
        load_dataset("imagenet", tmp_path)


def test_picture_that_is_lost_or_too_large_after_the_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_class_folders(tmp_path)
    train = load_dataset("imagenet", tmp_path).train
    assert isinstance(train, PictureFiles)
    monkeypatch.setattr("jointspar.training.data.class_folders.MAX_PICTURE_BYTES", 100)
    Path(train.files[0]).write_bytes(picture_bytes())
    Path(train.files[1]).unlink()
    for item, message in ((0, "0.JPEG is too large"), (1, "1.JPEG is missing")):
        with pytest.raises(DatasetError, match=message):
            train.read(train.labels.new_tensor([item]).numpy(), key=None)
