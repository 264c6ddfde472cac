"""What differs between the ranks' headers, in words, from rows that all of them gathered: one row a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jointspar.comm.hashing import stable_hash

_MAX_NAMED = 3  # differing layers that a message names


def differing_ranks(column: np.ndarray) -> str:
    """Such as "rank 1" or "ranks 1, 3": those whose entry is not rank 0's; empty when all agree."""
    ranks = np.flatnonzero(column != column[0])
    return ("rank " if ranks.size == 1 else "ranks ") + ", ".join(map(str, ranks)) if ranks.size else ""


def differing_settings(rows: np.ndarray, own: Mapping[str, object]) -> list[str]:
    """rows: int64 [world_size, 2 * n], hashes of a setting's name and value in turn, zeros behind them. own: here."""
    tables = [{int(name): int(value) for name, value in row.reshape(-1, 2) if name} for row in rows]
    names = {stable_hash(name): name for name in own}
    texts = []
    for key in sorted(set().union(*tables)):
        ranks = differing_ranks(np.array([table.get(key, 0) for table in tables]))
        if ranks and key in names:
            name = names[key]
            texts.append(f"setting '{name}' differs: {ranks} against rank 0 (here {own[name]!r})")
        elif ranks:
            texts.append(f"a setting that is missing here differs: {ranks} against rank 0")
    return texts


def differing_layers(counts: np.ndarray, hashes: np.ndarray, own_names: Sequence[str]) -> list[str]:
    """counts: int64 [world_size], numbers of layers. hashes: int64 [world_size, n], of each layer."""
    texts = []
    if (counts != counts[0]).any():
        texts.append("the numbers of layers differ: " + ", ".join(f"rank {r}: {n}" for r, n in enumerate(counts)))
    differing = np.flatnonzero((hashes != hashes[0]).any(axis=0))
    for layer in differing[:_MAX_NAMED]:
        name = f"'{own_names[layer]}'" if layer < len(own_names) else "(not present here)"
        texts.append(f"layer {layer} {name} differs: {differing_ranks(hashes[:, layer])} against rank 0")
    return texts
