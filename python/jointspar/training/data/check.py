"""Behind `jointspar data check`: whether a folder holds a dataset, complete and sound."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jointspar.training.data.class_folders import class_names, load_class_folders, read_picture_file
from jointspar.training.data.datasets import (
    default_folder,
    find_file,
    find_form,
    is_packaged,
    load_digits,
    read_part,
    remedy,
)
from jointspar.training.data.pictures import Source, open_picture
from jointspar.training.data.properties import PROPERTIES, DatasetProperties, Form
from jointspar.training.data.readers import DatasetError, MissingError, MissingPackageError
from jointspar.training.data.shards import SPLIT_PATTERNS, count_samples, find_shards, read_shard, read_sizes
from jointspar.training.launch import usable_cores

_MAX_SHOWN = 20  # problems that are printed; all are counted
_CHUNK = 256  # pictures handed to the threads at a time
_WNID = re.compile(r"n\d{8}")


class Finding(NamedTuple):
    """One line of the report. status: ok, missing or damaged."""

    status: str
    text: str


def check_dataset(name: str, data_dir: Path | None = None, *, is_full: bool = False) -> bool:
    """Print what is there, missing and damaged, and where to get it; whether the folder is complete and sound.

    Files of small datasets are read whole. Of ImageNet, all names, counts and labels are checked and one picture of
    each class folder or shard is decoded; with is_full every picture is.
    """
    properties, folder = PROPERTIES[name], data_dir or default_folder(name)
    place = "scikit-learn" if is_packaged(properties) else folder
    counts: Counter[str] = Counter()
    for finding in examine(properties, folder, is_full=is_full):
        counts[finding.status] += 1
        if finding.status == "ok" or counts.total() - counts["ok"] <= _MAX_SHOWN:
            tqdm.write(f"{finding.status:8} {finding.text}")
    problems = [f"{counts[status]:,} {status}" for status in ("missing", "damaged") if counts[status]]
    if problems:
        print(f"{name} in {place} is not sound: {', '.join(problems)}. To have it: {remedy(properties)}")
    else:
        print(f"{name} in {place} is complete and sound")
    return not problems


def examine(properties: DatasetProperties, folder: Path, *, is_full: bool) -> Iterator[Finding]:
    """The findings, as they come; at least one."""
    try:
        form, folder = find_form(properties, folder)
        yield from _EXAMINERS[form.kind](folder, properties, form, is_full)
    except DatasetError as error:
        yield Finding("missing" if isinstance(error, MissingError) else "damaged", str(error))
    except OSError as error:
        yield Finding("damaged", f"{error.filename or folder} cannot be read: {error.strerror}")


def _examine_package(folder: Path, properties: DatasetProperties, form: Form, is_full: bool) -> Iterator[Finding]:
    yield _counted(len(load_digits()[1]), properties.train_size + properties.test_size, "scikit-learn", "images")


def _examine_files(folder: Path, properties: DatasetProperties, form: Form, is_full: bool) -> Iterator[Finding]:
    for file in _progress(form.files, "file"):
        path, expected = find_file(folder, file), properties.items_in(file, form)
        if not path.is_file():
            yield Finding("missing", f"{path.name}: {expected:,} items")
            continue
        try:
            part = read_part(folder, file, properties, form)
        except DatasetError as error:
            yield Finding("damaged", str(error))
        else:
            what = " and ".join(name for name in part._fields if getattr(part, name) is not None)
            yield _counted(len(part), expected, path.name, what)


def _examine_folders(folder: Path, properties: DatasetProperties, form: Form, is_full: bool) -> Iterator[Finding]:
    splits = load_class_folders(folder, properties)
    for split, pictures in zip(("train", "test"), splits, strict=True):
        names = class_names(pictures.folder)
        yield _counted(len(names), properties.num_classes, pictures.folder, "class folders")
        for name in names:
            if not _WNID.fullmatch(name):
                yield Finding("damaged", f"{pictures.folder / name} is not a class of ImageNet, such as n01440764")
        yield _counted(len(pictures), properties.split_size(split), pictures.folder, "pictures")
        labels = pictures.labels.tolist()
        firsts = [file for k, file in enumerate(pictures.files) if k == 0 or labels[k] != labels[k - 1]]
        yield from _decoded([partial(read_picture_file, file) for file in (pictures.files if is_full else firsts)])


def _examine_shards(folder: Path, properties: DatasetProperties, form: Form, is_full: bool) -> Iterator[Finding]:
    for split in ("train", "test"):
        files, num_samples = find_shards(folder, split), 0
        if not files:
            yield Finding("missing", f"{folder / SPLIT_PATTERNS[split][0]}: {properties.split_size(split):,} samples")
            continue
        sizes = read_sizes(files[0].parent)
        for path in _progress(files, "shard"):
            try:
                num_found = count_samples(path, properties.num_classes)
                if num_found != sizes.get(path.name, num_found):
                    yield Finding("damaged", f"{path} holds {num_found} samples, sizes.json says {sizes[path.name]}")
                samples = read_shard(path, properties.num_classes)
                chosen = samples if is_full else islice(samples, 1)
                yield from _decoded((sample.source for sample in chosen), is_quiet=True)
                num_samples += num_found
            except MissingPackageError:
                raise
            except DatasetError as error:
                yield Finding("damaged", str(error))
        yield _counted(num_samples, properties.split_size(split), f"{len(files)} {split} shards", "samples")


def _counted(found: int, expected: int, place: object, what: str) -> Finding:
    if found == expected:
        return Finding("ok", f"{place}: {found:,} {what}")
    return Finding("damaged", f"{place}: {found:,} {what}, the data set has {expected:,}")


def _decoded(sources: Iterable[Source], *, is_quiet: bool = False) -> Iterator[Finding]:
    """Decode pictures on all cores; a finding for each that is damaged."""
    rest = iter(sources if is_quiet else _progress(sources, "picture"))
    with ThreadPoolExecutor(usable_cores()) as pool:
        while chunk := list(islice(rest, _CHUNK)):
            for problem in pool.map(_problem, chunk):
                if problem:
                    yield Finding("damaged", problem)


def _problem(source: Source) -> str:
    """What is wrong with a picture, or nothing."""
    try:
        name, content = source()
        with open_picture(content, name) as picture:
            picture.load()
    except MissingPackageError:
        raise
    except DatasetError as error:
        return str(error)
    return ""


def _progress(items: Iterable, unit: str) -> Iterable:
    return tqdm(items, unit=unit, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


_EXAMINERS: dict[str, Callable[[Path, DatasetProperties, Form, bool], Iterator[Finding]]] = {
    "package": _examine_package,
    "files": _examine_files,
    "folders": _examine_folders,
    "shards": _examine_shards,
}
