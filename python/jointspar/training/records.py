"""What a run leaves behind: metrics.jsonl line by line, summary.json at the end; and what rank 0 shows meanwhile."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jointspar.files import write_atomically

METRICS_FILE, SUMMARY_FILE, CURVES_FILE, CHECKPOINT_FOLDER = "metrics.jsonl", "summary.json", "curves.png", "checkpoint"


@dataclass(frozen=True)
class Summary:
    """The result of a run, the content of summary.json.

    test_accuracy: of the last evaluation, in [0, 1]. train_loss: mean over ranks and steps of the last epoch. seconds:
    spent in training steps, without evaluation and files. bytes_sent: handed to the transport for gradients and headers
    by one rank (mean over ranks), bytes_dense: what the same exchange of every layer would have taken, without headers;
    an allreduce of the transport's counts its buffer once, whatever that sends. active_fraction: mean share of layers
    computed per step. simulated: the ranks were played by one process, so that seconds are of all.
    exchange: how the gradients of the last step were summed.
    layers: names of the layers that are sampled, in the order of the metrics' probabilities.
    data: how many images, and a digest of them.
    """

    test_accuracy: float
    train_loss: float
    seconds: float
    steps: int
    world_size: int
    bytes_sent: int
    bytes_dense: int
    active_fraction: float
    method: str
    seed: int
    dataset: str
    model: str
    budget: float | None
    strategy: str | None
    epochs: int
    skipped_steps: int
    simulated: bool = False
    exchange: str = ""
    layers: list[str] = field(default_factory=list)
    data: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """How far a run has come; equal on all ranks whenever it is saved. Sums are over steps, loss over this epoch."""

    epoch: int = 0  # epochs completed
    is_to_evaluate: bool = False  # its last step is made, but the test data could not be read
    batch: int = 0  # batches of the next epoch that are already done
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    bytes_sent: float = 0.0
    bytes_dense: float = 0.0
    active_sum: float = 0.0
    skipped_steps: int = 0
    train_loss: float = float("nan")
    test_accuracy: float = float("nan")
    lr: float = float("nan")  # of the last step
    exchange: str = ""  # how the last step's gradients were summed


class MetricsFile:
    """metrics.jsonl, which only rank 0 writes: one JSON object a line.

    kind: "step" (its own loss), "epoch" (means, accuracy), or "stop" (the same where --max-steps ends within an epoch).
    epoch: epochs done, with a fraction in mid-epoch.
    """

    def __init__(self, path: Path, *, keep_up_to_step: int, is_over: bool = False) -> None:
        """Keep what an interrupted run wrote up to the step that it continues from (0: nothing).

        is_over: no step follows, so that a "stop" at its end stands.
        """
        known = read_metrics(path) if keep_up_to_step else []
        kept = [record for record in known if record["step"] <= keep_up_to_step]
        kept = [
            record for record in kept if record["kind"] != "stop" or (is_over and record["step"] == keep_up_to_step)
        ]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(json_safe(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; [] when there is none. A last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_summary(path: Path, summary: Summary) -> None:
    write_atomically(path, json.dumps(json_safe(asdict(summary)), indent=2) + "\n")


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint that was written to its end."""
    return any((folder / CHECKPOINT_FOLDER).glob("step-*"))


def remove_run(folder: Path) -> None:
    """Delete the files of a former run, and nothing else."""
    for name in (METRICS_FILE, SUMMARY_FILE, CURVES_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)


def json_safe(value: Any) -> Any:
    """NaN and infinities, for which JSON has no word, become null."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Display:
    """A progress bar on a terminal, one line an epoch elsewhere; silent on all ranks but 0."""

    def __init__(self, *, rank: int, first_step: int, num_steps: int) -> None:
        self._is_shown = rank == 0
        self._bar = None
        if self._is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def advance(self, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update()

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        if self._is_shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def readable_bytes(count: float) -> str:
    """Such as "12 kB", "3.4 MB" or "1.35 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def epoch_line(record: dict[str, Any], num_epochs: int) -> str:
    """One epoch in words, for people."""
    return (
        f"epoch {record['epoch']:>3.4g}/{num_epochs}  loss {record['train_loss']:.4f}  "
        f"test accuracy {100 * record['test_accuracy']:6.2f} %  lr {record['lr']:.4g}  "
        f"active {record['active_fraction']:.2f}  sent {readable_bytes(record['bytes_sent'])}  "
        f"{record['seconds']:.1f} s"
    )
