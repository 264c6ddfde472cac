"""What a process is told of its place among the ranks, the threads that follow from it, and what ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from jointspar.training import launch
from jointspar.training.launch import ending_signals_raise, launcher_rank, local_rank, local_ranks, threads_per_rank


def test_threads_are_the_ranks_share_of_the_cores_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(launch.LOCAL_SIZE_VARIABLES[0], "4")
    assert threads_per_rank() == 2
    monkeypatch.setenv(launch.LOCAL_SIZE_VARIABLES[0], "100")
    assert threads_per_rank() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank() == 3


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (["0-3", "4-7"], 4),
        (["0", "1"], 1),
        (["0-7", "0-7"], 4),
        (["0-3", "0-3", "4-7", "4-7"], 2),
        (["0-7"], 4),
    ],
    ids=["bound to its half", "to one core", "not bound", "two by two", "a sibling that cannot be seen"],
)
def test_a_rank_has_the_cores_that_it_is_bound_to(cores: list[str], expected: int, monkeypatch) -> None:
    """This process is the first of the launcher's children."""
    ranges = [range(int(each.split("-")[0]), int(each.split("-")[-1]) + 1) for each in cores]
    masks = {1000 + number: set(each) for number, each in enumerate(ranges)}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: masks.get(pid, masks[1000]))
    monkeypatch.setattr(launch, "_children_of", lambda process: list(masks))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(launch.LOCAL_SIZE_VARIABLES[0], str(max(2, len(cores))))
    assert threads_per_rank() == expected


def test_the_children_of_a_process_are_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in launch._children_of(os.getpid())
        child.communicate(b"\n")


def test_where_the_launcher_has_gone_the_cores_are_shared_by_all(monkeypatch) -> None:
    def affinity(pid: int) -> set[int]:
        if pid:
            raise ProcessLookupError
        return set(range(8))

    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(launch.LOCAL_SIZE_VARIABLES[0], "2")
    assert threads_per_rank() == 4


@pytest.mark.parametrize(
    ("rank_variable", "size_variable", "local_variable"),
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
        ("RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    ],
)
def test_launchers_are_recognised(
    rank_variable: str, size_variable: str, local_variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*launch.RANK_VARIABLES, *launch.LOCAL_SIZE_VARIABLES, *launch.LOCAL_RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert (launcher_rank(), local_ranks(), local_rank()) == (0, 1, 0)
    monkeypatch.setenv(rank_variable, "3")
    monkeypatch.setenv(size_variable, "4")
    monkeypatch.setenv(local_variable, "2")
    assert (launcher_rank(), local_ranks(), local_rank()) == (3, 4, 2)


@pytest.mark.usefixtures("interruptible")
def test_ending_signals_raise_what_they_should_and_an_ignored_one_stays_ignored() -> None:
    before = [signal.getsignal(number) for number in launch.ENDING_SIGNALS]
    with pytest.raises(ZeroDivisionError, match=str(int(signal.SIGHUP))), ending_signals_raise(ZeroDivisionError):
        signal.raise_signal(signal.SIGHUP)
    assert [signal.getsignal(number) for number in launch.ENDING_SIGNALS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the fixture takes it back
    with ending_signals_raise(SystemExit):
        signal.raise_signal(signal.SIGHUP)
    with pytest.raises(SystemExit), ending_signals_raise(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
