"""One rank's failure ends the job: without this the others would wait for it for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType

from jointspar.comm.refusals import CheckedTransport
from jointspar.comm.transport import PEER_GRACE_SECONDS
from jointspar.errors import JointSparError

_OUTPUT_SECONDS = 1.0  # in which the launcher hands on what was printed; an abort may drop it

_transports: list[CheckedTransport] = []  # that end all ranks


def abort_on_uncaught(transport: CheckedTransport) -> None:
    """Make an exception that leaves the program end all ranks, after its traceback was printed as before.

    A thread's exception does so only if it is a JointSparError: other threads may fail without harm to the ranks.
    Of several transports the one that failed does it, which has recorded how. Processes forked later keep the usual
    behaviour.
    """
    is_installed = bool(_transports)
    _transports[:] = [each for each in _transports if not each.is_closed] + [transport]
    if is_installed:
        return
    previous, previous_in_thread, pid = sys.excepthook, threading.excepthook, os.getpid()

    def end_job(error: BaseException | None) -> None:
        if os.getpid() != pid:
            return
        sys.stderr.flush()
        time.sleep(PEER_GRACE_SECONDS if isinstance(error, JointSparError) else _OUTPUT_SECONDS)
        still_open = [each for each in _transports if not each.is_closed]
        failed = [each for each in still_open if each._failure is not None]
        (failed or still_open or _transports)[-1].abort(f"uncaught {type(error).__name__}")

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        previous(kind, error, traceback)
        end_job(error)

    def thread_hook(arguments: threading.ExceptHookArgs) -> None:
        previous_in_thread(arguments)
        if isinstance(arguments.exc_value, JointSparError):
            end_job(arguments.exc_value)

    sys.excepthook, threading.excepthook = hook, thread_hook
