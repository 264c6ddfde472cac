"""SHA256SUMS beside data files: what differs from it, or is not in it, is not opened."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import data_files
from jointspar import cli
from jointspar.training.data import readers, shards
from jointspar.training.data.datasets import load_dataset
from jointspar.training.data.readers import DatasetError


def write_sums(folder: Path, mark: str = " ") -> None:
    files = sorted(path for path in folder.iterdir() if path.name != readers.SUMS_FILE)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {mark}{path.name}\n" for path in files]
    (folder / readers.SUMS_FILE).write_text("".join(lines))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_files.resize_table(monkeypatch, "mnist", train_size=20, test_size=6)
    data_files.write_mnist(tmp_path, suffix=".gz")
    write_sums(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mark", [" ", "*"])
def test_files_that_are_what_the_sums_say_are_read(mnist: Path, mark: str) -> None:
    write_sums(mnist, mark)
    assert len(load_dataset("mnist", mnist).train) == 20


def test_a_file_with_another_bit_is_not_opened(
    mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_dataset("mnist", mnist)
    flip_a_bit(mnist / "train-images-idx3-ubyte.gz")
    monkeypatch.setattr(readers.gzip, "open", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte\.gz is not the file of .*SHA256SUMS"):
        load_dataset("mnist", mnist)
    monkeypatch.undo()
    assert cli.main(("data", "check", "--dataset", "mnist", "--data-dir", str(mnist))) == 2
    assert "damaged" in capsys.readouterr().out


def test_a_file_that_the_sums_do_not_list_is_not_read(mnist: Path) -> None:
    sums = mnist / readers.SUMS_FILE
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "t10k-labels" not in line))
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte\.gz is not in"):
        load_dataset("mnist", mnist)


@pytest.mark.parametrize("text", ["<html>\n", "0123  name\n", f"{'0' * 64}name\n", "\n", "\0\ufffd\n"])
def test_damaged_sums_are_named(mnist: Path, text: str) -> None:
    (mnist / readers.SUMS_FILE).write_text(text)
    with pytest.raises(DatasetError, match="SHA256SUMS is not of the form"):
        load_dataset("mnist", mnist)


def test_shards_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.resize_table(monkeypatch, "imagenet", train_size=12, test_size=5)
    data_files.write_shards(tmp_path)
    shard = shards.find_shards(tmp_path, "train")[0]
    write_sums(shard.parent)
    assert shards.count_samples(shard, 1000) > 0
    flip_a_bit(shard)
    with pytest.raises(DatasetError, match="its SHA-256 differs"):
        shards.count_samples(shard, 1000)
