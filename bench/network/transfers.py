"""Each exchange on links of several rates, against the time that the link needs for the bytes of a ring."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alternate import spread
from network.hosts import INTERFACE, Hosts
from network.launchers import Launcher
from network.raw import measure

_PROGRAM = Path(__file__).with_name("exchange_ranks.py")
# What one job may take at 0.1 Gbit/s, several times what it does: to start, and for all exchanges of a megabyte.
_START_SECONDS, _MEGABYTE_SECONDS = 300.0, 3.0
_MODEL_MEGABYTES = 100.0  # of the largest model
SHARE_OF_IDEAL = 1.15  # the goal: within 15 % of the ideal time

Cell = dict[str, Any]  # one launcher, number of ranks, rate and kind of buffer, with its exchanges


def raw_rates(hosts: Hosts, num_ranks: int, seconds: float) -> dict[str, float]:
    """Payload in Gbit/s that plain sockets reach: around a ring of the hosts, and one way between two of them."""
    ring = measure(hosts, num_ranks, seconds=seconds)
    return {"ring_gbits": ring, "one_way_gbits": measure(hosts, 2, seconds=seconds, one_way=True)}


def measure_exchanges(
    hosts: Hosts, launcher: Launcher, num_ranks: int, raw: Mapping[str, float], options: argparse.Namespace
) -> Iterator[Cell]:
    """Cells of one job on the hosts at their present rate, for the model, megabytes and rounds of the options."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        program = [str(_PROGRAM), "--out", str(out), "--interface", INTERFACE, "--rounds", str(options.rounds)]
        program += ["--model", options.model, "--megabytes", *map(str, options.megabytes)]
        hosts.run(launcher, program, timeout=_time_limit(options) * hosts.slowness, num_ranks=num_ranks)
        measured = json.loads(out.read_text())
    common = {
        "kind": "transfers",
        "launcher": launcher.name,
        "transport": measured["transport"],
        "ranks": num_ranks,
        "gbits": hosts.gbits,
    }
    for figures in measured["figures"]:
        yield {**common, "raw": dict(raw), **_cell(figures, num_ranks, raw["ring_gbits"])}


def _time_limit(options: argparse.Namespace) -> float:
    megabytes = sum(options.megabytes) + _MODEL_MEGABYTES
    return _START_SECONDS + _MEGABYTE_SECONDS * megabytes * (options.rounds + 1)


def _cell(figures: dict[str, Any], num_ranks: int, raw_gbits: float) -> Cell:
    """Times against the ideal, and bytes against those of a ring of all layers' gradients.

    ideal_ms: what the busiest direction of any link carries, at the rate that plain sockets reached, the median round.
    of_ideal: measured time / ideal time of the same round. Sockets are measured once for each rate and number of ranks.
    """
    ring_bytes = figures["full_bytes"] * 2 * (num_ranks - 1) / num_ranks
    rows = []
    for name, exchange in figures["exchanges"].items():
        ideal_ms = np.array(exchange["needed_bytes"]) * 8 / (raw_gbits * 1e6)
        milliseconds = 1e3 * np.array(exchange["seconds"])
        rows.append(
            {
                "exchange": name,
                "is_chosen": name == figures["chosen"],
                "ms": spread(milliseconds)._asdict(),
                "ideal_ms": float(np.median(ideal_ms)),
                "of_ideal": spread(milliseconds / ideal_ms)._asdict(),
                "transport_bytes": exchange["transport_bytes"],
                "interface_bytes": exchange["interface_bytes"],
                "transport_share": exchange["transport_bytes"] / ring_bytes,
                "interface_share": exchange["interface_bytes"] / ring_bytes,
            }
        )
    return {"what": figures["what"], "full_bytes": figures["full_bytes"], "exchanges": rows}


def table(cell: Cell) -> str:
    """A line an exchange; the one that "auto" takes is marked."""
    raw = cell["raw"]
    lines = [
        f"{cell['launcher']}, {cell['ranks']} ranks, {cell['gbits']:g} Gbit/s "
        f"(sockets: ring {raw['ring_gbits']:.3g}, one way {raw['one_way_gbits']:.3g}), "
        f"{cell['full_bytes'] / 1e6:.3g} MB {cell['what']}",
        f"  {'':20}{'ms':>28}{'ideal ms':>10}{'x ideal':>9}{'':13}{'bytes / dense ring: transport, interface':>42}",
    ]
    for row in cell["exchanges"]:
        ms, ratio = row["ms"], row["of_ideal"]["median"]
        verdict = ("within 15 %" if ratio <= SHARE_OF_IDEAL else "TOO SLOW") if row["is_chosen"] else ""
        lines.append(
            f"  {('auto: ' if row['is_chosen'] else '') + row['exchange']:20}"
            f"{ms['median']:12.1f} [{ms['p10']:.1f}, {ms['p90']:.1f}]".ljust(50)
            + f"{row['ideal_ms']:8.1f}{ratio:9.2f}  {verdict:11}"
            f"{row['transport_share']:34.3f}{row['interface_share']:8.3f}"
        )
    return "\n".join(lines) + "\n"
