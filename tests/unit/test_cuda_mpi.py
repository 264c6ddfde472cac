"""The verdict on CUDA-aware MPI: what forces it, and what each outcome of the trial means."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from jobs import find_launcher
from jointspar.comm import cuda_mpi
from jointspar.comm.cuda_mpi import Verdict


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cuda_mpi.ENVIRONMENT_VARIABLE, raising=False)
    cuda_mpi.decide.cache_clear()


@pytest.mark.parametrize(("value", "is_usable"), [("0", False), ("1", True)])
def test_the_variable_forces_the_verdict_without_a_trial(monkeypatch, value, is_usable):
    monkeypatch.setenv(cuda_mpi.ENVIRONMENT_VARIABLE, value)
    monkeypatch.setattr(cuda_mpi, "probe", lambda: pytest.fail("tried"))
    assert cuda_mpi.decide() == Verdict(is_usable, f"JOINTSPAR_USE_CUDA_MPI={value}")


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(cuda_mpi.ENVIRONMENT_VARIABLE, "yes")
    with pytest.raises(ValueError, match="JOINTSPAR_USE_CUDA_MPI must be 0, 1 or auto, not 'yes'"):
        cuda_mpi.decide()


def test_without_a_device_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda_mpi, "probe", lambda: pytest.fail("tried"))
    assert not cuda_mpi.decide().is_usable


@pytest.mark.parametrize(
    ("returncode", "stdout", "stderr", "is_usable", "reason"),
    [
        (0, '{"says": true}\n{"says": true, "is_right": true}\n', "", True, "right sum"),
        (0, '{"says": true}\n{"says": true, "is_right": false}\n', "", False, "wrong sum"),
        (-11, '{"says": true}\n', "*** Process received signal ***\n", False, "signal 11"),
        (1, '{"says": true}\n', "Traceback\nRuntimeError: no kernel image\n", False, "RuntimeError: no kernel image"),
        (0, '{"says": false}\n', "", False, "built without CUDA"),
        (0, '{"says": null}\n', "", False, "no way to ask"),
        (1, "", "ImportError: libmpi\n", False, "does not start"),
        (0, 'noise\n{"says": false}\n{noise}\n', "", False, "built without CUDA"),
    ],
)
def test_every_outcome_of_a_trial_has_its_verdict(monkeypatch, returncode, stdout, stderr, is_usable, reason):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, returncode, stdout, stderr))
    verdict = cuda_mpi.probe()
    assert verdict.is_usable == is_usable
    assert reason in verdict.reason


def test_a_trial_that_hangs_is_a_no(monkeypatch):
    def hang(*arguments, **settings):
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "60 s" in cuda_mpi.probe().reason


def test_the_trial_runs_apart_from_the_launcher(monkeypatch):
    seen = {}

    def run(command, *, env, **settings):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, '{"says": false}', "")

    from_the_launcher = ["OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri", "PMIX_RANK", "PMI_RANK", "PRTE_LAUNCHED"]
    from_the_user = ["OMPI_MCA_opal_cuda_support", "PMIX_MCA_gds", "OMPI_ALLOW_RUN_AS_ROOT"]
    for name in (*from_the_launcher, *from_the_user):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(subprocess, "run", run)
    cuda_mpi.probe()
    assert not seen.keys() & set(from_the_launcher)
    assert seen.keys() >= set(from_the_user)
    assert seen["PATH"] == os.environ["PATH"]


@pytest.mark.mpi
def test_the_mpi_at_hand_is_asked_for_real():
    find_launcher("mpirun")
    verdict = cuda_mpi.probe()  # the wheels are built without CUDA
    assert verdict.is_usable or verdict.reason.endswith(("says it was built without CUDA", "has no way to ask"))
