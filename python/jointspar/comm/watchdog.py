"""Ends the process where Python cannot any more, because something holds the GIL for ever.

A transport's own deadline needs Python to run. The watchdog is a native thread of the extension: what it watches and
does not see end in time, it reports and leaves the process by `_exit(1)`, so that the launcher ends the other ranks.
Without the compiled extension there is no watchdog.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_core: ModuleType | None
try:
    _core = importlib.import_module("jointspar_ext._core")
except ImportError:  # the numba backend needs no compiled extension
    _core = None

DEADLINE = ("JOINTSPAR_TIMEOUT", 300.0)  # of every wait: a variable of the environment, and seconds without it
GRACE_SECONDS = 10.0  # beyond a transport's own deadline, which comes first wherever Python runs


@contextmanager
def watched(seconds: float, message: str, *, grace: float | None = None) -> Iterator[None]:
    """End the process, with the message, where the block lasts longer than `seconds` and the grace.

    grace: seconds; None is GRACE_SECONDS, for blocks that have a deadline of their own.
    """
    if _core is None:
        yield
        return
    watch = _core.start_watch(seconds + (GRACE_SECONDS if grace is None else grace), f"jointspar: {message}\n")
    try:
        yield
    finally:
        _core.end_watch(watch)


def end_within(seconds: float, message: str) -> None:
    """From now on the process has so many seconds to end by itself."""
    if _core is not None:
        _core.start_watch(seconds, f"jointspar: {message}\n")


def seconds_from_environment(name: str, default: float) -> float:
    """A positive number of seconds. Raises ValueError for anything else."""
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number of seconds, not {text!r}") from None
    if not seconds > 0:
        raise ValueError(f"{name} must be positive seconds, not {text}")
    return seconds
