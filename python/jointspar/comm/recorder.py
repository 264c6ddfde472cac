"""The last operations of a rank, to be read when the job has failed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

NUM_KEPT = 32


@dataclass
class Record:
    """One operation. `what` names its step; seconds are from its start to its end, None while it is under way."""

    what: str
    op: str
    num_bytes: int
    seconds: float | None = None
    _began: float = field(default_factory=time.monotonic)

    def finish(self) -> None:
        if self.seconds is None:
            self.seconds = time.monotonic() - self._began

    def elapsed(self) -> float:
        return time.monotonic() - self._began if self.seconds is None else self.seconds


class Recorder:
    """Keeps the last 32 operations of a rank; `dump` shows them once.

    rank: among the ranks of the transport. world_rank: the launcher's, which no other process of the job has.
    """

    def __init__(self, rank: int, world_rank: int) -> None:
        self._rank, self._world_rank = rank, world_rank
        self._records: deque[Record] = deque(maxlen=NUM_KEPT)
        self._is_dumped = False

    def start(self, what: str, op: str, num_bytes: int) -> Record:
        record = Record(what, op, num_bytes)
        self._records.append(record)
        return record

    def lines(self) -> list[str]:
        return [
            f"{record.what}: {record.op}, {record.num_bytes} bytes, {record.elapsed():.6f} s"
            + ("" if record.seconds is not None else ", not finished")
            for record in list(self._records)
        ]

    def dump(self, reason: str) -> None:
        """To stderr, and to JOINTSPAR_FAILURE_DIR/rank-R.json, R the launcher's, where that folder is named."""
        if self._is_dumped or not self._records:
            return
        self._is_dumped = True
        lines = [f"jointspar: rank {self._rank}: its last operations, oldest first"]
        lines += [f"  rank {self._rank}: {line}" for line in self.lines()]
        print("\n".join(lines), file=sys.stderr)
        folder = os.environ.get("JOINTSPAR_FAILURE_DIR")
        if folder:
            try:
                self._write(Path(folder), reason)
            except OSError as error:  # the failure itself matters more
                print(f"jointspar: rank {self._rank}: JOINTSPAR_FAILURE_DIR: {error}", file=sys.stderr)

    def _write(self, folder: Path, reason: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        operations = [
            {
                "what": record.what,
                "op": record.op,
                "bytes": record.num_bytes,
                "seconds": record.elapsed(),
                "is_finished": record.seconds is not None,
            }
            for record in list(self._records)
        ]
        content = {"rank": self._rank, "world_rank": self._world_rank, "reason": reason, "operations": operations}
        (folder / f"rank-{self._world_rank}.json").write_text(json.dumps(content, indent=1) + "\n")
