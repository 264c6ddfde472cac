"""The process of a run: alone in its folder, followed line by line, ended in order when this one is interrupted."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from jointspar.training.launch import job_environment

LOCK_FILE = ".lock"


class Terminated(BaseException):
    """A signal wants this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Wait until no other process works in `folder`; yields the descriptor of the lock.

    A job that is given the descriptor holds the lock too, so that it keeps the folder if this process is killed.
    """
    with (folder / LOCK_FILE).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield file.fileno()


def follow(words: Sequence[str], lock: int, log: TextIO, after_epoch: Callable[[str], object]) -> int:
    """Start a job and wait for its end; its exit code. Its output goes to `log`, lines on epochs also to after_epoch.

    It has a session of its own, since Ctrl-C would end it where it stands; instead it is asked to save and end.
    """
    job = subprocess.Popen(
        words, env=job_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", pass_fds=(lock,), start_new_session=True,
    )  # fmt: skip
    assert job.stdout is not None
    try:
        for line in job.stdout:
            log.write(line)
            if line.startswith("epoch "):
                after_epoch(line.strip())
        return job.wait()
    finally:
        if job.poll() is None:
            _end(job, log)


def _end(job: subprocess.Popen[str], log: TextIO) -> None:
    """Ask the job to save and end; if this process is interrupted once more, kill it."""
    try:
        job.send_signal(signal.SIGUSR1)  # one of STOP_SIGNALS
        with suppress(OSError):  # the terminal may be gone
            print("\nending the run in order, which saves it; once more kills it", file=sys.stderr, flush=True)
        rest, _ = job.communicate()
        log.write(rest)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
