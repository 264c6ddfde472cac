"""A Python that has torch already: `command(...)` stands for `[sys.executable, ...]` in tests that start many.

torch, with the compiler that its first optimizer imports, costs every process some 3 s of a core. Here one process
imports both and forks each interpreter that is asked for. What a launcher starts is a small stand-in, whose arguments
(-c, -m or a file), environment, folder, open files and ignored signals the fork takes over; signals to the stand-in
reach the fork, the end of the fork is that of the stand-in, and a stand-in that is killed takes its fork along.

multiprocessing's fork server serves its own parent only; these are started by mpirun and torchrun.

Differs from a fresh interpreter: all ranks hash strings alike, and /proc shows the environment of the first process.
Tests that are about either take `sys.executable`, and so do the fault campaign and the losses of ranks.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_LENGTH = struct.Struct("=q")
_STATUS = struct.Struct("=i")
_address: str | None = None


def command(*arguments: str) -> list[str]:
    """What to start in place of `[sys.executable, *arguments]`; the first call starts the process that forks."""
    global _address
    if _address is None:
        _address = _start_server()
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), _address, *arguments]


def _start_server() -> str:
    import atexit
    import subprocess
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = os.path.join(folder.name, "socket")
    server = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", "WARM_PYTHON": address},
        start_new_session=True,
    )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the process that imports torch for the others did not start"

    def end() -> None:
        server.communicate()  # the end of its input is its own
        folder.cleanup()

    atexit.register(end)
    return address


def stand_in(address: str, arguments: list[str]) -> None:
    """Has the server fork, and lives and ends as the fork does."""
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [number for number in files if number <= 2 or _is_inherited(number)]
    ignored = [number for number in _FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        job = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        text = json.dumps(job | {"files": files, "ignored": ignored}).encode()
        socket.send_fds(connection, [_LENGTH.pack(len(text))], files)
        connection.sendall(text)
        status = _STATUS.unpack(_receive(connection, _STATUS.size))[0]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _is_inherited(number: int) -> bool:
    """Whether it came with the process: MPICH hands its ranks a connection so. Python's own files close on exec."""
    try:
        return os.get_inheritable(number)
    except OSError:  # the one that listed the others
        return False


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise EOFError("the other side is gone")
        parts += part
    return parts


def serve(address: str) -> dict:
    """Forks for all who ask until its input ends; returns in each fork, with the job."""
    import gc
    import io

    import matplotlib.figure
    import sklearn.datasets  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    matplotlib.figure.Figure().savefig(io.BytesIO())
    gc.freeze()  # makes forks cheap, and their ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave nothing behind
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _keep(connection)
            connection.close()
    os._exit(0)


def _keep(connection: socket.socket) -> dict:
    """Forks the process itself, and stays between it and its stand-in."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(connection, _LENGTH.size, 64)
    job = json.loads(_receive(connection, _LENGTH.unpack(length)[0]))
    process = os.fork()
    if process == 0:
        connection.close()
        _place(files, job["files"])
        return job
    for number in files:
        os.close(number)
    ended = os.pidfd_open(process)
    while ended not in select.select([connection, ended], [], [])[0]:
        signals = connection.recv(64)
        for number in signals or [signal.SIGKILL]:  # none: the stand-in is gone
            os.kill(process, number)
        if not signals:
            os.waitpid(process, 0)
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    with suppress(BrokenPipeError):  # a launcher killed the stand-in meanwhile
        connection.sendall(_STATUS.pack(status))
    os._exit(0)


def _place(files: list[int], numbers: list[int]) -> None:
    """The received files under the numbers that they had in the stand-in."""
    import fcntl

    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 256) for file in files]
    os.closerange(0, 256)
    for file, number in zip(high, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def become(job: dict) -> None:
    """Run the job's program as `python` would."""
    import runpy

    for number in _FORWARDED:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in job["ignored"] else default)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    first, *arguments = job["arguments"]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = ["" if first in ("-c", "-m") else os.path.dirname(os.path.abspath(first)), *folders]
    if first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), _fresh_main())  # noqa: S102
    elif first == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        runpy.run_path(first, run_name="__main__")


def _fresh_main() -> dict:
    import types

    sys.modules["__main__"] = types.ModuleType("__main__")
    return vars(sys.modules["__main__"])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        stand_in(sys.argv[1], sys.argv[2:])
    else:
        become(serve(os.environ["WARM_PYTHON"]))
