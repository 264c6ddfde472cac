"""The interpreters that tests start in place of fresh ones behave as those do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm_python

FRESH, WARM = (lambda *arguments: [sys.executable, *arguments]), warm_python.command


def run(command: list[str], **options) -> tuple[int, str, list[str]]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    "code",
    [
        "",
        "import sys; print(sys.argv, file=sys.stderr); sys.exit(7)",
        "import sys; sys.exit('a message')",
        "print(input() + open('file').read())",
        "import os; print(os.environ['ONE'], sorted(os.environ) == sorted([*os.environ, 'ONE']), os.getcwd())",
        "import beside; print(beside.__file__)",
        "print(__name__, len(globals()) < 12)",
        "raise ValueError(3)",
        "raise KeyboardInterrupt",
        "raise SystemExit",
        "raise SystemExit(True)",
        "import sys; sys.excepthook = lambda *_: print('a hook'); raise ValueError(3)",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()",
        "import os; os.abort()",
        "import atexit; atexit.register(print, 'the end')",
        "import atexit, os; atexit.register(os._exit, 5)",
        "import atexit; atexit.register(lambda: 1 / 0)",
    ],
)
def test_each_program_ends_as_in_a_fresh_interpreter(tmp_path: Path, code: str) -> None:
    (tmp_path / "file").write_text("from the folder")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "beside.py").touch()
    environment = {**os.environ, "ONE": "1", "PYTHONPATH": str(tmp_path / "elsewhere")}
    ends = [
        run(python("-c", code, "some", "-c", "arguments"), cwd=tmp_path, env=environment, input="typed ")
        for python in (FRESH, WARM)
    ]
    assert ends[0] == ends[1]


def test_files_and_modules_run_as_in_a_fresh_interpreter(tmp_path: Path) -> None:
    program = "import sys; from beside import name; print(__name__, sys.argv, name); sys.exit(name == '__main__')"
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "beside.py").write_text("name = __name__\n")
    for arguments in (["program.py", "a"], ["-m", "program", "b"], [str(tmp_path / "program.py")]):
        ends = [run(python(*arguments), cwd=tmp_path) for python in (FRESH, WARM)]
        assert ends[0] == ends[1]
        assert ends[0][:2] != (1, "")


def test_torch_is_there_and_jointspar_is_not() -> None:
    """Nor a thread, which would not be there after the fork."""
    code = """
import os, sys
print([name in sys.modules for name in ("torch", "torch._dynamo", "jointspar", "mpi4py.MPI", "numba", "cupy")])
print(len(os.listdir("/proc/self/task")))
"""
    assert run(WARM("-c", code))[:2] == (0, "[True, True, False, False, False, False]\n1\n")


def test_inherited_files_keep_their_numbers() -> None:
    """MPICH tells its ranks the number of a connection."""
    read, write = os.pipe()
    code = f"import os; os.write({write}, b'through')"
    assert run(WARM("-c", code), pass_fds=[write])[0] == 0
    os.close(write)
    assert os.read(read, 100) == b"through"
    os.close(read)


@pytest.mark.parametrize("ignored", ["", "INT", "HUP TERM"])
def test_ignored_signals_are_those_of_the_stand_in(ignored: str) -> None:
    """nohup, and a shell that starts something in the background, have signals ignored."""
    names = "SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1"
    code = f"import signal; print([repr(signal.getsignal(getattr(signal, name))) for name in {names}])"
    shell = ["sh", "-c", (f"trap '' {ignored}; " if ignored else "") + 'exec "$@"', "sh"]
    fresh, warm = (run([*shell, *python("-c", code)]) for python in (FRESH, WARM))
    assert fresh == warm
    assert fresh[0] == 0 and fresh[1].count("SIG_IGN") >= len(ignored.split())


SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_ends_both(number: signal.Signals) -> None:
    with subprocess.Popen(WARM("-c", SLEEP), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        fork = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(timeout=10) == -number
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{fork}") and time.monotonic() < until:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{fork}")


def test_a_handler_of_the_program_is_called() -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); " + SLEEP
    with subprocess.Popen(WARM("-c", code), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=10) == 3
