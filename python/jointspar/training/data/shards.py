"""Webdataset shards: tar files of key.jpg and key.cls, read from front to back. Nothing is extracted to disk."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jointspar.training.data.pictures import MAX_PICTURE_BYTES, SUFFIXES
from jointspar.training.data.properties import DatasetProperties
from jointspar.training.data.readers import DatasetError, check_sum, read_json

SIZES_FILE = "sizes.json"  # optional: {"name.tar": number of samples}, which saves counting at the start
SPLIT_PATTERNS = {"train": ("train/*.tar", "*train*.tar"), "test": ("val/*.tar", "*val*.tar")}
_SPLIT_WORDS = ("train", "val")
_MAX_LABEL_BYTES = 20
_CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")
_END_MARK = bytes(tarfile.BLOCKSIZE)  # what follows the last member


class Sample(NamedTuple):
    """One member pair of a shard. name: of the shard and the key, for messages."""

    name: str
    picture: bytes
    label: int

    def source(self) -> tuple[str, bytes]:
        """For pictures.decode_batch."""
        return self.name, self.picture


class _Member(NamedTuple):
    key: str
    suffix: str
    info: tarfile.TarInfo
    archive: tarfile.TarFile


@dataclass(frozen=True)
class Shards:
    """A split in tar files, with the number of samples of each."""

    properties: DatasetProperties
    files: list[Path]
    sizes: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def fingerprint(self) -> object:
        """Differs where ranks have different data."""
        return [[path.name for path in self.files], self.sizes]

    def read(self, shard: int) -> Iterator[Sample]:
        """The samples of one shard, in order. Raises DatasetError, also for a number that is not the one counted."""
        num_read = 0
        for sample in read_shard(self.files[shard], self.properties.num_classes):
            num_read += 1
            yield sample
        if num_read != self.sizes[shard]:
            raise DatasetError(f"{self.files[shard]} holds {num_read} samples, not {self.sizes[shard]} as counted")


def find_shards(folder: Path, split: str) -> list[Path]:
    """Sorted: the tar files of train/ or val/, else those of the folder itself with train or val in their names.

    Raises DatasetError for a file of the folder itself whose name has both.
    """
    in_folder, by_name = (
        sorted(path for path in folder.glob(pattern) if path.is_file()) for pattern in SPLIT_PATTERNS[split]
    )
    if not in_folder and (both := [path for path in by_name if all(word in path.name for word in _SPLIT_WORDS)]):
        raise DatasetError(f"{both[0]} may be of either split by its name: sort the shards into train/ and val/")
    return in_folder or by_name


def load_shards(folder: Path, properties: DatasetProperties) -> tuple[Shards, Shards]:
    """The training and the test split. Counts samples where no sizes.json says how many. Raises DatasetError."""
    train, test = (_load_split(folder, split, properties) for split in ("train", "test"))
    return train, test


def _load_split(folder: Path, split: str, properties: DatasetProperties) -> Shards:
    files = find_shards(folder, split)
    if not files:
        raise DatasetError(f"{folder} has no shards for {split}: neither {' nor '.join(SPLIT_PATTERNS[split])}")
    known = read_sizes(files[0].parent)
    sizes = [known[path.name] if path.name in known else count_samples(path, properties.num_classes) for path in files]
    if empty := [path for path, size in zip(files, sizes, strict=True) if size == 0]:
        raise DatasetError(f"{empty[0]} holds no samples")
    return Shards(properties, files, sizes)


def read_sizes(folder: Path) -> dict[str, int]:
    """Samples by file name where sizes.json says so, else nothing. Raises DatasetError."""
    path = folder / SIZES_FILE
    if not path.is_file():
        return {}
    sizes = read_json(path)
    if not isinstance(sizes, dict) or not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise DatasetError(f"{path} is not a JSON object of file names and numbers of samples")
    return sizes


def count_samples(path: Path, num_classes: int) -> int:
    """Samples of a shard, from headers and labels. Raises DatasetError."""
    return sum(1 for _ in read_shard(path, num_classes, with_pictures=False))


def read_shard(path: Path, num_classes: int, *, with_pictures: bool = True) -> Iterator[Sample]:
    """The samples of a shard in order: consecutive members of one key, a picture and a label; others are passed over.

    with_pictures False leaves `picture` empty and its bytes unread. Names in the archive are never used as paths.
    Raises DatasetError.
    """
    key, picture, label = "", None, None
    check_sum(path)
    try:
        for member in _members(path):
            if member.key != key:
                if key:
                    yield _sample(path, key, picture, label)
                key, picture, label = member.key, None, None
            if member.suffix in SUFFIXES:
                if picture is not None:
                    raise DatasetError(f"{path}: {key} has two pictures")
                picture = _content(path, member, MAX_PICTURE_BYTES, is_read=with_pictures)
            elif member.suffix == ".cls":
                label = _label(path, member, num_classes)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is damaged: {error}") from error
    if key:
        yield _sample(path, key, picture, label)


def _members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path, "r:") as archive:  # "r:" is uncompressed: no decompression bomb
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
            if info.size < 0 or archive.offset <= info.offset:  # it would be read again and again
                raise DatasetError(f"{path} is damaged: {info.name!r} has a negative size")
            if info.isdir():
                continue
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise DatasetError(f"{path}: {info.name!r} is a link or device, a shard holds plain files")
            name = PurePosixPath(info.name)
            stem, dot, suffix = name.name.partition(".")
            yield _Member(str(name.parent / stem), (dot + suffix).lower(), info, archive)
        # tarfile takes a damaged header, or a cut between two members, for the end.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(len(_END_MARK)) != _END_MARK:
            raise DatasetError(f"{path} is damaged or truncated at byte {archive.offset}: no header and no end mark")


def _content(path: Path, member: _Member, max_bytes: int, *, is_read: bool = True) -> bytes:
    if member.info.size > max_bytes:
        raise DatasetError(f"{path}: {member.info.name!r} is too large: {member.info.size} bytes")
    file = member.archive.extractfile(member.info) if is_read else None  # a view into the archive, no file on disk
    return file.read() if file else b""


def _label(path: Path, member: _Member, num_classes: int) -> int:
    text = _content(path, member, _MAX_LABEL_BYTES).strip()
    if not text.isdigit() or int(text) >= num_classes:
        raise DatasetError(f"{path}: {member.info.name!r} holds {text!r}, the classes are 0 to {num_classes - 1}")
    return int(text)


def _sample(path: Path, key: str, picture: bytes | None, label: int | None) -> Sample:
    if picture is None or label is None:
        what = "picture" if picture is None else "label (.cls)"
        hint = ": a class archive of ILSVRC has to be unpacked" if _CLASS_ARCHIVE.fullmatch(path.name) else ""
        raise DatasetError(f"{path}: {key} has no {what}{hint}")
    return Sample(f"{path}: {key}", picture, label)
