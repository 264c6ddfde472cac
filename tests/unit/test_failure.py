"""Which transport ends the job where an exception leaves the program."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from jointspar.comm import failure, watchdog
from jointspar.comm.process import Options, ProcessTransport
from jointspar.comm.refusals import CheckedTransport


class Noting(CheckedTransport):
    """Notes how it ended the job."""

    def __init__(self) -> None:
        super().__init__(library="", name="noting", rank=1, world_size=2, timeout=1.0)
        self.messages: list[str] = []

    def abort(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process; the hooks that were there print nothing."""
    monkeypatch.setattr(failure, "_transports", [])
    monkeypatch.setattr(failure, "_OUTPUT_SECONDS", 0.0)
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(("failed", "ends"), [(0, 0), (1, 1), (2, 2), (None, 2)])
def test_the_transport_that_failed_tells_how(failed: int | None, ends: int) -> None:
    transports = [Noting() for _ in range(3)]
    for transport in transports:
        failure.abort_on_uncaught(transport)
    if failed is not None:
        transports[failed].fail("lost a message")
    sys.excepthook(ValueError, ValueError("elsewhere"), None)
    assert [transport.messages for transport in transports] == [
        ["uncaught ValueError"] if number == ends else [] for number in range(3)
    ]


@pytest.mark.usefixtures("hooks")
def test_a_closed_transport_ends_nothing_while_there_is_another() -> None:
    closed, other = Noting(), Noting()
    for transport in (other, closed):
        failure.abort_on_uncaught(transport)
    closed._mark_closed()
    sys.excepthook(ValueError, ValueError("elsewhere"), None)
    assert (closed.messages, other.messages) == ([], ["uncaught ValueError"])


class Ending(ProcessTransport):
    """Its abort would return."""

    def _is_shut_down(self) -> bool:
        return False

    def _end_job(self) -> None:
        """Does nothing."""


@pytest.mark.parametrize(("aborts", "seconds"), [(True, 5.0), (False, 300.0 + watchdog.GRACE_SECONDS)])
def test_an_abort_gets_no_grace_and_a_wait_does(monkeypatch: pytest.MonkeyPatch, aborts: bool, seconds: float) -> None:
    watched: list[float] = []
    fake = SimpleNamespace(start_watch=lambda seconds, _: watched.append(seconds), end_watch=lambda _: None)
    monkeypatch.setattr(watchdog, "_core", fake)
    options = Options(timeout=300.0, warn=60.0, on_failure="raise")
    transport = Ending(library="", name="ending", rank=0, world_rank=0, world_size=2, options=options)
    transport._mark_closed()  # its exit is not that of this process
    if aborts:
        transport.abort("test")
    else:
        with transport._watch("test"):
            pass
    assert watched == [seconds]
