"""`jointspar reproduce`: lists are checked, runs are made once and continued, and the report says what they found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jobs
from jointspar import cli
from jointspar.training.reproduce import experiments, results, runs
from jointspar.training.reproduce.experiments import ListError, load_list, parse_list

MINIMAL: dict[str, Any] = {"title": "T", "experiments": [{"name": "one", "runs": {"dense": {"method": "lars"}}}]}

# Stands for `jointspar train`: two epochs at once, with numbers that depend on seed and method in a known way.
FAKE_TRAIN = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, seed, method = Path(flags["--out"]), int(flags["--seed"]), flags["--method"]
if method == "sgd":
    print("no luck today")
    sys.exit(3)
(out / "calls").open("a").write("called\\n")
accuracy = {"lars": 0.90, "jointspar-lars": 0.85}[method] + 0.01 * seed
line = {"kind": "epoch", "epoch": 1, "step": 5, "train_loss": 0.5, "test_accuracy": accuracy / 2, "seconds": 2.0,
        "bytes_sent": 100, "active_fraction": 0.5, "phase_ms": {"forward": 1.0, "exchange": 2.0}}
step = {"kind": "step", "epoch": 0.5, "step": 3, "probabilities": [0.25, 1.0]}
last = {**step, "epoch": 1, "probabilities": [0.5, 0.75]}
end = {**line, "epoch": 2, "test_accuracy": accuracy, "seconds": 4.0, "bytes_sent": 2000}
(out / "metrics.jsonl").write_text("".join(json.dumps(each) + "\\n" for each in (step, last, line, end)))
summary = {"test_accuracy": accuracy, "train_loss": None if seed == 2 else 0.25, "seconds": 4.0 + seed,
           "bytes_sent": 2000 + 2000 * seed, "active_fraction": 0.5}
(out / "summary.json").write_text(json.dumps(summary))
print("epoch   1/2  loss\\nepoch   2/2  loss")
"""


def write_list(folder: Path, methods: str = "", settings: str = "epochs = 2", seeds: str = "[0, 1]") -> Path:
    path = folder / "small.toml"
    path.write_text(
        f'title = "Small <list>"\n[[experiments]]\nname = "one"\nranks = 2\nseeds = {seeds}\n'
        f"settings = {{ {settings} }}\n"
        '[experiments.runs]\n"dense" = { method = "lars" }\n"half" = { method = "jointspar-lars", budget = 0.5 }\n'
        + methods
    )
    return path


@pytest.fixture
def fake_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs end at once; a launcher is needed by none of them."""
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE_TRAIN)
    monkeypatch.setattr(runs, "train_command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(runs, "find_launcher", lambda: "env")
    real = runs.command
    monkeypatch.setattr(runs, "command", lambda run, launcher: real(run, launcher)[3:])  # without `env -n 2`
    return tmp_path


def reproduce(path: Path, out: Path, *more: str) -> int:
    return cli.main(["reproduce", "--list", str(path), "--out", str(out), *more])


@pytest.mark.parametrize("name", sorted(path.stem for path in experiments.LISTS.glob("*.toml")))
def test_every_list_that_comes_along_is_sound(name: str) -> None:
    assert load_list(name).experiments


def test_the_paper_list_holds_the_papers_settings() -> None:
    for experiment in load_list("paper").experiments:
        for label in experiment.runs:
            config = experiment.config(label, 0, Path())
            assert (config.epochs, config.warmup(), config.schedule_milestones()) == (90, 5, (30, 50, 70))
            assert (config.batch_size, config.base_lr, experiment.num_ranks) == (1024, 0.1, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiments": []}, "experiments is empty"),
        ({"title": 3}, "title must be a string"),
        ({"tittle": "x"}, "unknown entry 'tittle'"),
        ({"experiments": ["x"]}, "experiment 1: must be a table"),
        ({"experiments": [{"name": "one"}]}, "runs is empty"),
        ({"experiments": [{"runs": {}}]}, "name is missing"),
        ({"experiments": [MINIMAL["experiments"][0], MINIMAL["experiments"][0]]}, "two experiments are named 'one'"),
    ],
)
def test_a_wrong_list_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ListError, match=message):
        parse_list("L", {**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../up"}, "names a folder"),
        ({"ranks": 2, "simulate_workers": 2}, "exclude each other"),
        ({"ranks": 0}, "at least 1"),
        ({"ranks": True}, "ranks must be a integer"),
        ({"seeds": [1, 1]}, "seeds must be different integers"),
        ({"seeds": [0.5]}, "seeds must be different integers"),
        ({"reference": "x"}, "reference 'x' is none of its runs"),
        ({"runs": {"a/b": {}}}, "a label names a folder"),
        ({"runs": {"a b": {}, "a-b": {}}}, "its folder would be that of another run"),
        ({"runs": {"a": 3}}, "must be a table of settings"),
        ({"runs": {"a": {"budgett": 0.5}}}, "unknown setting 'budgett'"),
        ({"runs": {"a": {"seed": 1}}}, "unknown setting 'seed'"),
        ({"runs": {"a": {"epochs": "3"}}}, "epochs = '3' has the wrong type"),
        ({"runs": {"a": {"epochs": 3.5}}}, "wrong type"),
        ({"runs": {"a": {"nesterov": 1}}}, "wrong type"),
        ({"runs": {"a": {"milestones": ["x"]}}}, "wrong type"),
        ({"runs": {"a": {"method": "lars", "budget": 0.5}}}, r"run 'a': --budget does not act with --method lars"),
        ({"runs": {"a": {"budget": 1.5}}}, "out of range"),
    ],
)
def test_a_wrong_experiment_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ListError, match=message):
        parse_list("L", {**MINIMAL, "experiments": [{**MINIMAL["experiments"][0], **change}]})


def test_settings_of_run_come_before_those_of_experiment_and_list() -> None:
    content = {
        "title": "T",
        "settings": {"epochs": 1, "batch_size": 8, "momentum": 0.5},
        "runs": {"a": {"epochs": 3}},
        "experiments": [{"name": "one", "settings": {"epochs": 2, "batch_size": 16}}],
    }
    config = parse_list("L", content).experiments[0].config("a", 7, Path("x"))
    assert (config.epochs, config.batch_size, config.momentum, config.seed) == (3, 16, 0.5, 7)


def test_flags_say_what_the_list_says(tmp_path: Path) -> None:
    settings = {
        "method": "jointspar",
        "distribution": "bandit",
        "shift": True,
        "milestones": [1, 2.5],
        "nesterov": False,
    }
    content = {**MINIMAL, "experiments": [{"name": "one", "simulate_workers": 3, "runs": {"a b": settings}}]}
    (run,) = runs.runs_of(parse_list("L", content), tmp_path)
    assert run.flags() == [
        "--out", str(tmp_path / "one/a-b/seed-0"), "--method", "jointspar", "--distribution", "bandit", "--shift",
        "--milestones", "1", "2.5", "--seed", "0", "--simulate-workers", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["--list", "no-such-list"], ["--list", "quick", "--only", "nothing"]])
def test_an_unknown_name_ends_with_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
    assert "choose from" in capsys.readouterr().err


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "list.toml"
    path.write_text("title = ")
    assert reproduce(path, tmp_path / "out") == 2
    assert "not TOML" in capsys.readouterr().err


def test_a_rehearsal_prints_the_commands_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(write_list(tmp_path), tmp_path / "out", "--dry-run", "--launcher", "mpirun --hostfile h") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("mpirun --hostfile h -n 2 ") for line in lines)
    assert not (tmp_path / "out").exists()


def test_results_hold_what_the_runs_left(fake_training: Path) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training), out) == 0
    found = json.loads((out / "results.json").read_text())
    (experiment,) = found["experiments"]
    assert (experiment["runs_missing"], experiment["reference"]) == (0, "dense")
    dense, half = experiment["runs"]
    assert [seed["seed"] for seed in half["seeds"]] == [0, 1]
    assert half["seeds"][1]["summary"]["test_accuracy"] == pytest.approx(0.86)
    assert [epoch["epoch"] for epoch in dense["seeds"][0]["epochs"]] == [1, 2]
    assert half["seeds"][0]["probabilities"] == {"epoch": [0.5, 1], "values": [[0.25, 1.0], [0.5, 0.75]]}
    assert half["seeds"][1]["probabilities"] is None


def test_the_table_gives_mean_range_and_points_from_the_reference(fake_training: Path) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training, seeds="[0, 2]"), out) == 0
    rows = results.table(json.loads((out / "results.json").read_text())["experiments"][0])
    assert rows[0].cells == (
        "91.00 % (90.00 % to 92.00 %)", "not finite in 1 of 2", "5 (4 to 6)", "4 kB (2 kB to 6 kB)",
        "50 % (50 % to 50 %)",
    )  # fmt: skip
    assert rows[0].points is None
    assert rows[1].points == pytest.approx(-5.0)


def test_the_report_needs_no_other_file(fake_training: Path) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training), out) == 0
    page = (out / "report.html").read_text()
    assert "Small &lt;list&gt;" in page
    assert "85.50 % (85.00 % to 86.00 %)" in page and "-5.00" in page
    assert page.count('src="data:image/png;base64,') == 3 == len(list((out / "figures").glob("*.png")))
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


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
    (begun / "checkpoint").mkdir()
    (begun / "checkpoint/step").touch()
    assert reproduce(path, out) == 0
    assert (begun / "log.txt").read_text().splitlines()[-3].endswith(" --resume")


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


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_and_simulated_workers_give_the_same_accuracy(tmp_path: Path) -> None:
    jobs.find_launcher("mpirun")  # skips, or fails under `make test`, where there is no MPI
    path = tmp_path / "both.toml"
    path.write_text(
        'title = "Both"\nsettings = { epochs = 2, batch_size = 256, threads = 1, exchange = "allreduce" }\n'
        '[runs]\n"half" = { method = "jointspar-lars", budget = 0.5 }\n'
        '[[experiments]]\nname = "mpi"\nranks = 2\n[[experiments]]\nname = "simulated"\nsimulate_workers = 2\n'
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "jointspar", "reproduce", "--list", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    mpi, simulated = json.loads((tmp_path / "out/results.json").read_text())["experiments"]
    summaries = [experiment["runs"][0]["seeds"][0]["summary"] for experiment in (mpi, simulated)]
    assert summaries[0]["test_accuracy"] == summaries[1]["test_accuracy"] > 0.1
    assert summaries[0]["train_loss"] == pytest.approx(summaries[1]["train_loss"], rel=1e-6)
