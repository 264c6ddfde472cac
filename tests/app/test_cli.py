"""The command line as a user meets it: exit codes, one clear line, under mpirun too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jobs
import warm_python
from jointspar import cli
from jointspar.training import flags
from jointspar.training.config import TrainConfig, flag

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)]),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused, and return its one line."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--help"),
        (("fly",), "invalid choice"),
        (("train",), "--out"),
        (("train", "--out", "x", "--epochs", "many"), "--epochs"),
        (("train", "--out", "x", "--colour", "red"), "unknown argument '--colour'"),
        (("train", "--out", "x", "--method", "adam"), "choose from sgd, lars, jointspar, jointspar-lars"),
        (("train", "--out", "x", "--budget", "1.5"), "--budget 1.5 is out of range"),
        (("train", "--out", "x", "--budget", "half"), "--budget"),
        (("train", "--out", "x", "--method", "lars", "--budget", "0.5"), "--budget does not act"),
        (("train", "--out", "x", "--method", "sgd", "--compression-ratio", "0.1"), "use --method randomk or topk"),
        (("train", "--out", "x", "--method", "qsgd", "--qsgd-levels", "300"), "--qsgd-levels must be from 1 to 127"),
        (("train", "--out", "x", "--method", "topk", "--wire-dtype", "float16"), "--wire-dtype does not act"),
        (("bench",), "ops"),
        (("bench", "sleep"), "invalid choice"),
        (("data",), "check"),
        (("data", "check"), "--dataset"),
        (("data", "check", "--dataset", "tiny"), "invalid choice"),
        (("data", "check", "--dataset", "mnist", "--loud"), "unknown argument '--loud'"),
        (("train", "--out", "x", "--dataset", "imagenet", "--model", "resnet20"), "choose from resnet18, resnet50"),
        (("doctor", "--loud"), "unknown argument '--loud'"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "6"), "--budget: 6 layers of 5"),
        (("--budget", "0.5", "--p-min", "0.9"), "--p-min: 0.9"),
        (("--strategy", "psychic"), "--strategy: 'psychic' is not one of"),
        (("--wire-dtype", "int8"), "--wire-dtype"),
        (("--exchange", "pigeon"), "pigeon"),
        (("--batch-size", "2000"), "give a smaller --batch-size"),
        (("--resume",), "no checkpoint"),
        (("--warmup-epochs", "3"), "--warmup-epochs does not act with 64 samples per step"),
        (("--dataset", "mnist", "--data-dir", "nowhere"), "train-images-idx3-ubyte is missing"),
        (("--dataset", "svhn", "--data-dir", "nowhere"), "train_32x32.mat is missing"),
        (("--dataset", "imagenet", "--model", "resnet18", "--data-dir", "nowhere"), "nowhere/train is missing"),
    ],
)
def test_what_only_the_run_can_know_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, "train", "--out", str(tmp_path / "run"), *flags)


def test_out_that_cannot_be_written_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "train", "--out", str(tmp_path / "file" / "run"))


def test_out_that_holds_a_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert "--resume, or give another folder" in refused(capsys, "train", "--out", str(tmp_path))


def test_budget_with_a_dot_is_a_fraction_and_without_a_count() -> None:
    one, whole = flags._budget("1"), flags._budget("1.0")
    assert (type(one), one) == (int, 1)
    assert (type(whole), whole) == (float, 1.0)


def test_every_setting_of_a_run_has_a_flag() -> None:
    command = [sys.executable, "-m", "jointspar", "train", "--help"]
    text = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert [name for name in TrainConfig.__dataclass_fields__ if flag(name) not in text] == []


@pytest.mark.parametrize("name", cli._BENCHMARKS)
def test_bench_outside_a_checkout_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "python" / "jointspar" / "cli.py"))
    assert "needs a checkout" in refused(capsys, "bench", name, "--quick")


def test_bench_names_the_packages_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("scipy", "numba") else name)
    assert "needs numba, scipy: pip install 'jointspar[bench]'" in refused(capsys, "bench", "ops", "--quick")


def test_bench_hands_all_further_arguments_to_the_script_and_returns_its_code(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "ops.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "python" / "jointspar" / "cli.py"))
    arguments = ["lars_update", "--threads", "1", "2", "--help"]
    assert cli.main(["bench", "ops", *arguments]) == 3
    assert capfd.readouterr().out == f"{arguments}\n"


def test_a_stopped_bench_lets_its_script_clean_up_first(tmp_path: Path) -> None:
    """The script takes a second; `jointspar` ends after it, with its code."""
    clean_up = "import signal, sys, time\ndef leave(*_):\n    time.sleep(1)\n    print('clean')\n    sys.exit(7)\n"
    wait = "signal.signal(signal.SIGTERM, leave)\nprint('up', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "script.py").write_text(clean_up + wait)
    run = "import os, sys; from jointspar.cli import _run_script as run; "
    command = [sys.executable, "-c", f"{run}sys.exit(run([sys.executable, 'script.py'], dict(os.environ)))"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == "clean\n"
    assert process.returncode == 7


@pytest.mark.parametrize("name", cli._BENCHMARKS)
def test_every_listed_benchmark_has_its_script_in_this_checkout(name: str) -> None:
    assert (ROOT / "bench" / cli._BENCHMARKS[name].script).is_file()


@pytest.mark.mpi
@pytest.mark.parametrize("flags", [("--budget", "1.5"), ("--budget", "6")], ids=["before MPI starts", "after"])
def test_under_mpirun_rank_0_speaks_for_all(tmp_path: Path, flags: tuple[str, ...]) -> None:
    launcher = jobs.find_launcher("mpirun")
    train = warm_python.command("-m", "jointspar", "train", "--out", str(tmp_path / "run"), *flags)
    command = [*launcher, "2", *train]
    job = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
    assert job.returncode == 2, job.stderr
    assert job.stderr.count("jointspar train: --budget") == 1
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize(("rank", "begin"), [("0", "jointspar train: needs"), ("1", "rank 1: jointspar train: needs")])
def test_a_rank_whose_host_lacks_a_package_says_so(
    rank: str, begin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    monkeypatch.setattr(cli, "_SPEAKER_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["train", "--out", "unused"]) == 2
    assert capsys.readouterr().err.startswith(begin)


@pytest.mark.mpi
def test_under_torchrun_rank_0_speaks_for_all(tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "run"), "--budget", "6"]
    train = warm_python.command("-m", "jointspar", "train", *flags)
    job = jobs.run_job([*jobs.find_launcher("torchrun"), "2", *train], 100)
    assert job.code == 1, job.output  # torchrun's own, whatever its ranks return
    assert job.output.count("jointspar train: --budget") == 1
