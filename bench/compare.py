"""Compares two result files of `jointspar bench ops`, `step` or `network` by ratios; these hold where machines drift.

Worse means that a ratio of one of our variants fell by more than 10%: to the best peer, to the machine's limit, to the
plain dense step, or to a link's own speed. The peer is the best one of the old file that the new one has, too.
What differs between the two measurements beside the code is noted, and what only the old one has is counted.
Exit code 0: nothing is worse; 1: something is; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results import NETWORK_SCHEMA, SCHEMA, STEP_SCHEMA, Cell

SCHEMAS = (SCHEMA, STEP_SCHEMA, NETWORK_SCHEMA)
RATIOS = {
    "speedup": "over the best peer",
    "of_limit": "of the limit",
    "of_plain": "of the plain step's speed",
    "of_link": "of the link's speed",
}
PEERS = ("peer", "dense")  # roles
# Of a cell: what the ratios of two files should have in common.
SETTINGS = {
    "best_peer": "best peer",
    "best_dense": "best dense peer",
    "case": "case",
    "threads": "number of threads",
    "iterations": "number of iterations",
    "caches": "state of the caches",
    "transports": "transport",
    "transport": "transport",
}
LARGEST_FALL = 0.10

Key = tuple[str, ...]  # what was measured, variant, ratio


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
    changes, gone = changes_of(old, new)
    if not changes:
        raise ValueError("the files have no ratio in common: other operations, models or variants")
    for name, was, now in _other_circumstances(old, new):
        print(f"note: another {name}: {was} -> {now}")
    for key in gone:
        print(f"note: no longer measured: {', '.join(key)}")
    worse = [change for change in changes if change.is_worse]
    for change in sorted(worse, key=lambda change: change.new / change.old):
        print(f"WORSE  {change}")
    no_longer = f"; {len(gone)} are no longer measured" if gone else ""
    print(f"{len(worse)} of {len(changes)} ratios are worse by more than {LARGEST_FALL:.0%}{no_longer}")
    return 1 if worse else 0


def _other_circumstances(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What ratios depend on beside our code, where it differs: (name, in the old file, in the new file)."""
    machines = old["machine"], new["machine"]
    pairs = [(name, *(of.get(name) for of in machines)) for name in machines[0] if name != "load_average"]
    versions = old["versions"], new["versions"]
    pairs += [(name, *(of.get(name) for of in versions)) for name in dict.fromkeys([*versions[0], *versions[1]])]
    pairs += [("number of rounds", old["rounds"], new["rounds"])]
    for cell, other in _cell_pairs(old, new):
        names = [name for name in SETTINGS if name in cell and name in other]
        pairs += [(f"{SETTINGS[name]} of {', '.join(_place(cell))}", cell[name], other[name]) for name in names]
    yield from ((name, was, now) for name, was, now in pairs if was != now)


def changes_of(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], list[Key]]:
    """Every ratio that both files have of our variants, and the keys of those that only the old one has."""
    changes, gone = [], []
    for cell, other in _cell_pairs(old, new):
        peer = _common_peer(cell, other)
        before, after = dict(_ratios(cell, peer)), dict(_ratios(other, peer))
        changes += [Change(key, before[key], after[key]) for key in before if key in after]
        gone += sorted(before.keys() - after.keys())
    return changes, gone


def _cell_pairs(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[Cell, Cell]]:
    """Each cell of the old file with that of the new one; {} where it has none.

    What was measured twice (by the parts iterations and loss of network) is paired in order.
    """
    cells: defaultdict[Key, deque[Cell]] = defaultdict(deque)
    for cell in new["cells"]:
        cells[_place(cell)].append(cell)
    for cell in old["cells"]:
        if place := _place(cell):
            yield cell, cells[place].popleft() if cells[place] else {}


def _common_peer(old: Cell, new: Cell) -> str | None:
    """The fastest peer of the old cell, by its median, of those that the new one has."""
    of_new = {row["variant"] for row in new.get("variants", [])}
    ms = {row["variant"]: row["ms"]["median"] for row in old.get("variants", []) if row["role"] in PEERS}
    return min(ms.keys() & of_new or ms, key=ms.__getitem__, default=None)


def _ratios(cell: Cell, peer: str | None) -> Iterator[tuple[Key, float]]:
    """The medians of our variants; a peer that became slower is no fault of ours.

    speedup: over `peer`: formed within rounds where that is the cell's best peer, else a ratio of medians.
    """
    rows = cell.get("variants", [])
    ms = {row["variant"]: row["ms"]["median"] for row in rows}
    for row in (row for row in rows if row["role"] == "ours"):
        ratios = {name: row[name]["median"] for name in RATIOS if row.get(name) is not None}
        if peer != cell.get("best_peer", cell.get("best_dense")):
            ratios["speedup"] = ms[peer] / ms[row["variant"]] if peer in ms else None
        yield from (
            ((*_place(cell), row["variant"], name), ratio) for name, ratio in ratios.items() if ratio is not None
        )
    for row in (row for row in cell.get("exchanges", []) if row["is_chosen"]):
        yield (*_place(cell), "auto", "of_link"), 1 / row["of_ideal"]["median"]


def _place(cell: Cell) -> Key:
    """What was measured, apart from the variant; () of what has no ratios."""
    if "exchanges" in cell:
        size = f"{cell['full_bytes'] / 1e6:g} MB {cell['what']}"
        return cell["launcher"], f"ranks {cell['ranks']}", f"{cell['gbits']:g} Gbit/s", size
    if "model" in cell:
        rate = [f"{cell['gbits']:g} Gbit/s"] if "gbits" in cell else []
        return cell["model"], f"ranks {cell['ranks']}", *rate
    if "operation" in cell:
        return cell["operation"], cell["case"], cell["dtype"], f"threads {cell['threads']}"
    return ()


if __name__ == "__main__":
    sys.exit(main())
