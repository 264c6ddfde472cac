"""Webdataset shards, good and hostile; nothing ever leaves the archive."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_files import picture_bytes, sample_members, write_shards, write_tar
from jointspar.training.data.datasets import load_dataset
from jointspar.training.data.readers import DatasetError
from jointspar.training.data.shards import Shards, count_samples, find_shards, read_shard

PICTURE = ("a.jpg", picture_bytes())
LABEL = ("a.cls", b"3")


def special_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar_of(path: Path, *infos: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for info in infos:
            archive.addfile(info)
    return path


def test_samples_come_in_order_with_content_and_label(tmp_path: Path) -> None:
    members = sample_members(0, 3)
    write_tar(tmp_path / "a.tar", members)
    samples = list(read_shard(tmp_path / "a.tar", 1000))
    assert [sample.picture for sample in samples] == [content for name, content in members if name.endswith("jpg")]
    assert [sample.label for sample in samples] == [0, 1, 2]
    assert samples[0].name.endswith("a.tar: 000000")
    assert count_samples(tmp_path / "a.tar", 1000) == 3


def test_labels_may_precede_pictures_and_other_members_are_passed_over(tmp_path: Path) -> None:
    members = [("x/b.cls", b" 7\n"), ("x/b.json", b"{}"), ("x/b.JPEG", PICTURE[1])]
    write_tar(tmp_path / "a.tar", members)
    [sample] = read_shard(tmp_path / "a.tar", 10)
    assert (sample.label, sample.picture) == (7, PICTURE[1])


def test_folders_in_the_archive_are_passed_over(tmp_path: Path) -> None:
    assert count_samples(tar_of(tmp_path / "a.tar", special_member("train", tarfile.DIRTYPE)), 10) == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([PICTURE], r"a has no label \(\.cls\)"),
        ([LABEL], "a has no picture"),
        ([PICTURE, ("b.cls", b"3")], "a has no label"),
        ([PICTURE, ("a.png", b""), LABEL], "a has two pictures"),
        ([PICTURE, ("a.cls", b"10")], "'a.cls' holds b'10', the classes are 0 to 9"),
        ([PICTURE, ("a.cls", b"-1")], "holds b'-1'"),
        ([PICTURE, ("a.cls", b"")], "holds b''"),
        ([PICTURE, ("a.cls", "٣".encode())], "holds b'"),
        ([PICTURE, ("a.cls", b"3" * 1000)], "'a.cls' is too large: 1000 bytes"),
    ],
)
def test_damaged_samples_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "shard.tar", members)
    with pytest.raises(DatasetError, match=message) as error:
        list(read_shard(tmp_path / "shard.tar", 10))
    assert "shard.tar" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar_of(tmp_path / "a.tar", special_member("a.jpg", kind, "/etc/passwd"))
    with pytest.raises(DatasetError, match=r"a\.tar.*(link or device|damaged)"):
        list(read_shard(path, 10))


def test_picture_that_promises_more_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DatasetError, match="is too large: 1099511627776 bytes"):
        list(read_shard(tmp_path / "a.tar", 10))


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/jointspar-escaped", "a/../../escaped", "C:\\escaped"])
def test_names_that_lead_out_of_the_archive_write_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "one" / "two"
    write_tar(folder / "a.tar", [(f"{name}.jpg", PICTURE[1]), (f"{name}.cls", b"3")])
    before = sorted(tmp_path.rglob("*"))
    assert [sample.label for sample in read_shard(folder / "a.tar", 10)] == [3]
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(Path("/tmp").glob("jointspar-escaped*"))


def whole_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in sample_members(0, 2):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def cuts() -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(whole_tar())) as archive:
        headers = [member.offset for member in archive]
    return [0, 100, 512, 700, *headers[1:], headers[2] + 300]


@pytest.mark.parametrize("cut", cuts())
def test_truncated_shard_is_named_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.tar").write_bytes(whole_tar()[:cut])
    with pytest.raises(DatasetError, match=r"a\.tar is damaged"):
        count_samples(tmp_path / "a.tar", 10)


def test_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(whole_tar())
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as archive:
        content[archive.getmembers()[2].offset] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.tar is damaged or truncated at byte"):
        count_samples(tmp_path / "a.tar", 10)


@pytest.mark.parametrize("size", [-512, -513, -1])
def test_a_member_of_negative_size_is_damage_and_no_endless_loop(tmp_path: Path, size: int) -> None:
    content = bytearray(whole_tar())
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as archive:
        at = archive.getmembers()[1].offset
    content[at + 124 : at + 136] = size.to_bytes(12, "big", signed=True)  # GNU's base 256
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.tar is damaged"):
        count_samples(tmp_path / "a.tar", 10)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x1f\x8b" + bytes(600), picture_bytes()])
def test_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.tar is damaged"):
        count_samples(tmp_path / "a.tar", 10)


def test_archive_of_a_class_says_that_it_has_to_be_unpacked(tmp_path: Path) -> None:
    write_tar(tmp_path / "n01440764.tar", [("n01440764_1.JPEG", PICTURE[1])])
    with pytest.raises(DatasetError, match="has to be unpacked"):
        count_samples(tmp_path / "n01440764.tar", 10)


def test_shards_are_found_in_split_folders_or_by_name(tmp_path: Path) -> None:
    for name in ("imagenet-train-000.tar", "imagenet-val-000.tar"):
        write_tar(tmp_path / name, sample_members(0, 1))
    assert [path.name for path in find_shards(tmp_path, "train")] == ["imagenet-train-000.tar"]
    assert [path.name for path in find_shards(tmp_path, "test")] == ["imagenet-val-000.tar"]
    write_shards(tmp_path)
    assert [path.parent.name for path in find_shards(tmp_path, "test")] == ["val", "val"]


@pytest.mark.parametrize("name", ["pretrain-val-000.tar", "trainval-000.tar", "retrieval-train-0.tar"])
def test_a_shard_that_may_be_of_either_split_is_refused(tmp_path: Path, name: str) -> None:
    for each in ("my-train-0.tar", name):
        write_tar(tmp_path / each, sample_members(0, 1))
    with pytest.raises(DatasetError, match=f"{name} may be of either split"):
        load_dataset("imagenet", tmp_path)
    write_shards(tmp_path)  # folders say which is which
    assert len(load_dataset("imagenet", tmp_path).train) > 1


def test_sizes_file_saves_counting(tmp_path: Path) -> None:
    write_shards(tmp_path)
    sizes = {f"imagenet-train-{k:06}.tar": 100 + k for k in range(3)}
    (tmp_path / "train" / "sizes.json").write_text(json.dumps(sizes))
    train = load_dataset("imagenet", tmp_path).train
    assert isinstance(train, Shards)
    assert train.sizes == [100, 101, 102]


@pytest.mark.parametrize("text", ["[1]", '{"a.tar": "1"}', '{"a.tar": -1}', '{"a.tar": true}', "{"])
def test_damaged_sizes_file_is_named(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path)
    (tmp_path / "train" / "sizes.json").write_text(text)
    with pytest.raises(DatasetError, match=r"sizes\.json is"):
        load_dataset("imagenet", tmp_path)


def test_missing_split_and_empty_shard_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "a.tar", [])
    with pytest.raises(DatasetError, match=r"a\.tar holds no samples"):
        load_dataset("imagenet", tmp_path)
    write_tar(tmp_path / "train" / "a.tar", sample_members(0, 1))
    with pytest.raises(DatasetError, match="has no shards for test"):
        load_dataset("imagenet", tmp_path)
