"""The exceptions that jointspar raises beyond ValueError and TypeError for bad arguments, and how it warns."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class JointSparError(RuntimeError):
    """Base of all run-time failures of this library."""


class DesyncError(JointSparError):
    """Ranks disagree about what comes next; raised on every rank before any payload was exchanged."""


class CollectiveTimeout(JointSparError):
    """A wait on other ranks outlived its deadline; the communicator must not be used again."""


class RanksLost(JointSparError):
    """Other ranks have died, and those that are left may go on: see `optimizer.shrink()`.

    Raised by the step; with overlap=True also by `backward()`, in which ranks meet.
    """


class CheckpointError(JointSparError):
    """A checkpoint is missing, damaged, or belongs to another run."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into this package, through torch where torch calls it."""
    level = 2
    outer: FrameType | None = sys._getframe(1)
    while outer is not None and outer.f_globals.get("__name__", "").partition(".")[0] in ("jointspar", "torch"):
        level, outer = level + 1, outer.f_back
    warnings.warn(message, category, stacklevel=level)
