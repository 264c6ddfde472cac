"""One rank's failure ends the job: without this the others would wait for it for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType

from jointspar.comm.transport import PEER_GRACE_SECONDS, Transport
from jointspar.errors import JointSparError

_OUTPUT_SECONDS = 0.2  # in which the launcher hands on what was printed; an abort may drop it

_installed = False


def abort_on_uncaught(transport: Transport) -> None:
    """Make an exception that leaves the program end all ranks, after its traceback was printed as before.

    A thread's exception does so only if it is a JointSparError: other threads may fail without harm to the ranks.
    Installed once a process; processes forked later keep the usual behaviour.
    """
    global _installed
    if _installed:
        return
    _installed = True
    previous, previous_in_thread, pid = sys.excepthook, threading.excepthook, os.getpid()

    def end_job(error: BaseException | None) -> None:
        if os.getpid() != pid:
            return
        sys.stderr.flush()
        time.sleep(PEER_GRACE_SECONDS if isinstance(error, JointSparError) else _OUTPUT_SECONDS)
        transport.abort(f"uncaught {type(error).__name__}")

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        previous(kind, error, traceback)
        end_job(error)

    def thread_hook(arguments: threading.ExceptHookArgs) -> None:
        previous_in_thread(arguments)
        if isinstance(arguments.exc_value, JointSparError):
            end_job(arguments.exc_value)

    sys.excepthook, threading.excepthook = hook, thread_hook
