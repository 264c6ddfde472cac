"""`jointspar reproduce`: runs are made once and continued, and what is not sound is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import jobs
import warm_python
from fake_training import reproduce, write_list
from jointspar.training.reproduce import figures, runs
from jointspar.training.reproduce.experiments import load_list


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and are the subject of another file."""
    monkeypatch.setattr(figures, "draw", lambda experiment: [])


def test_a_rehearsal_prints_the_commands_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(write_list(tmp_path), tmp_path / "out", "--dry-run", "--launcher", "mpirun --hostfile h") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("mpirun --hostfile h -n 2 ") for line in lines)
    assert not (tmp_path / "out").exists()


def test_complete_runs_are_not_run_again_and_a_missing_one_is(fake_training: Path) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    lost = out / "one/half/seed-1"
    (lost / "summary.json").unlink()
    assert reproduce(path, out, "--report") == 0
    assert json.loads((out / "results.json").read_text())["experiments"][0]["runs_missing"] == 1
    assert reproduce(path, out) == 0
    calls = {place.parent: place.read_text().count("called") for place in out.rglob("calls")}
    assert [calls.pop(lost), *calls.values()] == [2, 1, 1, 1]


def test_an_interrupted_run_is_resumed(fake_training: Path) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    begun = out / "one/half/seed-1"
    (begun / "summary.json").unlink()
    (begun / "checkpoint/step-00000003").mkdir(parents=True)
    assert reproduce(path, out) == 0
    assert (begun / "log.txt").read_text().splitlines()[-3].endswith(" --resume")


def test_a_run_that_was_killed_while_it_first_saved_begins_again(fake_training: Path) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    begun = out / "one/half/seed-1"
    (begun / "summary.json").unlink()
    (begun / "checkpoint/.partial-step-00000003").mkdir(parents=True)
    assert reproduce(path, out) == 0
    assert "--resume" not in (begun / "log.txt").read_text()


def test_other_settings_in_the_same_folder_are_refused(fake_training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training), out) == 0
    assert reproduce(write_list(fake_training, settings="epochs = 3, momentum = 0.5"), out) == 2
    assert "holds a run with another epochs, milestones, momentum" in capsys.readouterr().err


def test_a_failing_run_is_told_and_the_others_are_made(fake_training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training, methods='"bad" = { method = "sgd" }\n'), out) == 1
    assert re.search(r"one, bad, seed 0: failed with exit code 3.*no luck today", capsys.readouterr().err, re.S)
    assert json.loads((out / "results.json").read_text())["experiments"][0]["runs_missing"] == 2


@pytest.mark.parametrize(
    ("before", "after", "different"),
    [
        ("ranks = 2", "ranks = 2\nsettings.threads = 1", "threads"),
        ("ranks = 2", "ranks = 2\nsettings.log_every = 3", "log_every"),
        ("settings.budget = 1", "settings.budget = 1.0", "budget"),
        ("simulate_workers = 2", "ranks = 2", "simulated"),
    ],
)
def test_whatever_decides_numbers_or_times_must_be_the_same(
    fake_training: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, different: str
) -> None:
    path, out = fake_training / "list.toml", fake_training / "out"
    for lines, code in ((before, 0), (before, 0), (after, 2)):
        path.write_text(f'title = "T"\n[[experiments]]\nname = "one"\n{lines}\nruns.half.method = "jointspar-lars"\n')
        assert reproduce(path, out) == code
    assert f"holds a run with another {different}: remove" in capsys.readouterr().err


def test_what_failed_may_be_mended_in_the_list(fake_training: Path) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training, methods='"bad" = { method = "sgd" }\n'), out) == 1
    assert reproduce(write_list(fake_training, methods='"bad" = { method = "lars", lr = 0.5 }\n'), out) == 0


def test_a_run_that_reproduce_did_not_make_is_refused(fake_training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    (out / "one/half/seed-1/run.json").unlink()
    assert reproduce(path, out) == 2
    assert "did not make: remove that folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "summary.json", "metrics.jsonl"])
def test_a_damaged_file_is_named(fake_training: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    (out / "one/half/seed-1" / name).write_text("{\n")
    assert reproduce(path, out) == 2
    assert re.search(r"one, half, seed 1: .*seed-1.* is damaged .*remove", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('strategy = "psychic"', "strategy: 'psychic' is not one of"),
        ("budget = 6", "budget: 6 layers of 5 is more"),
        ("budget = 0.5, p_min = 0.9", "p_min: 0.9 is more"),
        ('exchange = "pigeon"', "exchange: 'pigeon' is not one of"),
        ("warmup_epochs = 1, batch_size = 64", "--warmup-epochs does not act with 128 samples per step"),
        ("batch_size = 1000", "--batch-size 1000 on 2 ranks needs 2000 samples per step"),
        ('dataset = "mnist"', "nowhere/mnist/train-images-idx3-ubyte is missing"),  # $JOINTSPAR_DATA
    ],
)
def test_what_a_run_would_refuse_is_refused_before_anything_runs(
    fake_training: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: str,
    message: str,
) -> None:
    monkeypatch.setenv("JOINTSPAR_DATA", "nowhere")
    out = fake_training / "out"
    methods = f'"wrong" = {{ method = "jointspar-lars", {settings} }}\n'
    assert reproduce(write_list(fake_training, methods=methods), out) == 2
    assert re.search(f"one(, run 'wrong')?: {re.escape(message)}", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--launcher", ""), "--launcher is empty"),
        (("--launcher", "mpirun 'x"), "--launcher mpirun 'x: No closing quotation"),
        (("--launcher", "no-such-program -x"), "no no-such-program was found"),
        (("--launcher", "env", "--report"), "--launcher does not act with --report"),
        (("--report",), "there is no such folder"),
        (("--rep",), "unknown argument '--rep'"),
    ],
)
def test_a_flag_that_cannot_act_is_refused_in_one_line(
    fake_training: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert reproduce(write_list(fake_training), fake_training / "out", *flags) == 2
    assert message in (errors := capsys.readouterr().err) and errors.count("\n") == 1


def test_without_a_launcher_ranks_are_refused_and_one_process_is_not(
    fake_training: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "find_launcher", lambda: None)
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 2
    assert "no mpirun was found" in capsys.readouterr().err
    path.write_text(path.read_text().replace("ranks = 2", ""))
    assert reproduce(path, out, "--launcher", "env") == 2
    assert "--launcher does not act" in capsys.readouterr().err


def test_under_a_launcher_it_is_refused(
    fake_training: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    assert reproduce(write_list(fake_training), fake_training / "out") == 2
    assert "start it without a launcher" in capsys.readouterr().err


def test_out_that_cannot_be_written_is_refused(fake_training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fake_training / "file").touch()
    assert reproduce(write_list(fake_training), fake_training / "file/out") == 2
    assert "cannot be written: Not a directory; give another folder" in capsys.readouterr().err


def test_a_full_disk_ends_it_in_one_line(
    fake_training: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_atomically", fail)
    assert reproduce(write_list(fake_training), fake_training / "out") == 1
    assert capsys.readouterr().err.endswith("No space left on device; once that is mended the same command goes on\n")


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_and_simulated_workers_give_the_same_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.find_launcher("mpirun")  # skips, or fails under `make test`, where there is no MPI
    monkeypatch.setattr(runs, "train_command", lambda: warm_python.command("-m", "jointspar", "train"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    path = tmp_path / "both.toml"
    path.write_text(
        'title = "Both"\nsettings = { epochs = 2, batch_size = 256, threads = 1, exchange = "allreduce" }\n'
        '[runs]\n"half" = { method = "jointspar-lars", budget = 0.5 }\n'
        '[[experiments]]\nname = "mpi"\nranks = 2\n[[experiments]]\nname = "simulated"\nsimulate_workers = 2\n'
    )
    assert reproduce(path, tmp_path / "out") == 0
    mpi, simulated = json.loads((tmp_path / "out/results.json").read_text())["experiments"]
    summaries = [experiment["runs"][0]["seeds"][0]["summary"] for experiment in (mpi, simulated)]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"] > 0.1
    assert summaries[0]["train_loss"] == pytest.approx(summaries[1]["train_loss"], rel=1e-6)


def test_the_committed_results_are_those_of_the_committed_list() -> None:
    out = Path(__file__).parents[2] / "bench/results/reproduce-reduced"
    if not out.exists():
        pytest.skip("an sdist has no results of measurements")
    chosen, found = load_list("reduced"), json.loads((out / "results.json").read_text())
    for run in runs.runs_of(chosen, out):
        runs.check_folder(run)
    for experiment, reported in zip(chosen.experiments, found["experiments"], strict=True):
        assert [reported[name] for name in ("name", "title", "text")] == [
            experiment.name,
            experiment.title,
            experiment.text,
        ]
        folders = {
            (run.label, run.seed): run.folder for run in runs.runs_of(chosen, out) if run.experiment is experiment
        }
        for run in reported["runs"]:
            for seed in run["seeds"]:
                summary = folders[run["label"], seed["seed"]] / "summary.json"
                assert json.loads(summary.read_text()) == seed["summary"]
        assert all(run["settings"] == experiment.runs[run["label"]] for run in reported["runs"])
