"""Compares two result files of `jointspar bench ops`, or two of `step`, by ratios, which hold although machines drift.

Worse means that a ratio of one of our variants fell by more than 10%: to the best peer, to the machine's limit, or to
the plain dense step.
What differs between the two measurements beside the code is noted, and so is what only the old one has.
Exit code 0: nothing is worse; 1: something is; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results import SCHEMA, STEP_SCHEMA

SCHEMAS = (SCHEMA, STEP_SCHEMA)
RATIOS = {"speedup": "over the best peer", "of_limit": "of the limit", "of_plain": "of the plain step's speed"}
# Of a cell: what the ratios of two files should have in common.
SETTINGS = {
    "best_peer": "best peer",
    "best_dense": "best dense peer",
    "case": "case",
    "threads": "number of threads",
    "iterations": "number of iterations",
    "caches": "state of the caches",
}
LARGEST_FALL = 0.10

Key = tuple[str, ...]  # operation, case, dtype, threads, variant, ratio; or model, ranks, variant, ratio


class Change(NamedTuple):
    """A ratio's medians in the old and in the new file; both are the larger the better."""

    key: Key
    old: float
    new: float

    @property
    def is_worse(self) -> bool:
        return not self.new >= (1.0 - LARGEST_FALL) * self.old  # a NaN is not a measurement

    def __str__(self) -> str:
        *place, ratio = self.key
        change = 100 * (self.new / self.old - 1)
        return f"{', '.join(place)}: {self.old:.3g} -> {self.new:.3g} {RATIOS[ratio]} ({change:+.0f}%)"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="jointspar bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    options = parser.parse_args(arguments)
    try:
        return report(read(options.old), read(options.new))
    except ValueError as error:
        print(f"jointspar bench compare: {error}", file=sys.stderr)
        return 2


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError, naming the file, where it cannot be compared."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema not in SCHEMAS:
        known = " and ".join(map(repr, SCHEMAS))
        raise ValueError(f"{path}: has schema {schema!r}; this version compares {known}: measure again")
    if record["quick"]:
        raise ValueError(f"{path}: comes from --quick, which measures nothing")
    return record


def report(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print what changed; returns the exit code. Raises ValueError where the files have no ratio in common."""
    if old["schema"] != new["schema"]:
        raise ValueError(f"the files are of two benchmarks: {old['schema']!r} and {new['schema']!r}")
    before, after = dict(ratios(old)), dict(ratios(new))
    changes = [Change(key, before[key], after[key]) for key in before if key in after]
    if not changes:
        raise ValueError("the files have no ratio in common: other operations, models or variants")
    for name, was, now in _other_circumstances(old, new):
        print(f"note: another {name}: {was} -> {now}")
    for key in sorted(before.keys() - after.keys()):
        print(f"note: no longer measured: {', '.join(key)}")
    worse = [change for change in changes if change.is_worse]
    for change in sorted(worse, key=lambda change: change.new / change.old):
        print(f"WORSE  {change}")
    print(f"{len(worse)} of {len(changes)} ratios are worse by more than {LARGEST_FALL:.0%}")
    return 1 if worse else 0


def _other_circumstances(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What ratios depend on beside our code, where it differs: (name, in the old file, in the new file)."""
    pairs = [(name, old["machine"][name], new["machine"][name]) for name in ("processor", "cores")]
    pairs += [("torch", old["versions"]["torch"], new["versions"]["torch"])]
    pairs += [("number of rounds", old["rounds"], new["rounds"])]
    cells = {_place(cell): cell for cell in new["cells"]}
    for cell in old["cells"]:
        other = cells.get(_place(cell), {})
        names = [name for name in SETTINGS if name in cell and name in other]
        pairs += [(f"{SETTINGS[name]} of {', '.join(_place(cell))}", cell[name], other[name]) for name in names]
    yield from ((name, was, now) for name, was, now in pairs if was != now)


def ratios(record: dict[str, Any]) -> Iterator[tuple[Key, float]]:
    """The medians of our variants; a peer that became slower is no fault of ours."""
    for cell in record["cells"]:
        for row in cell["variants"]:
            for name in RATIOS:
                if row["role"] == "ours" and row.get(name) is not None:
                    yield (*_place(cell), row["variant"], name), row[name]["median"]


def _place(cell: dict[str, Any]) -> Key:
    """What was measured, apart from the variant."""
    if "model" in cell:
        return cell["model"], f"ranks {cell['ranks']}"
    return cell["operation"], cell["case"], cell["dtype"], f"threads {cell['threads']}"


if __name__ == "__main__":
    sys.exit(main())
