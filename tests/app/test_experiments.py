"""Lists of experiments: what is accepted, what is refused and how, and what becomes of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jointspar import cli
from jointspar.training.config import TrainConfig
from jointspar.training.data.properties import PROPERTIES
from jointspar.training.reproduce import experiments, runs
from jointspar.training.reproduce.experiments import ListError, load_list, parse_list

MINIMAL: dict[str, Any] = {"title": "T", "experiments": [{"name": "one", "runs": {"dense": {"method": "lars"}}}]}


@pytest.mark.parametrize("name", sorted(path.stem for path in experiments.LISTS.glob("*.toml")))
def test_every_list_that_comes_along_is_sound(name: str) -> None:
    assert load_list(name).experiments


def test_the_paper_list_holds_the_papers_settings() -> None:
    for experiment in load_list("paper").experiments:
        for label in experiment.runs:
            config = experiment.config(label, 0, Path())
            assert (config.epochs, config.warmup(), config.schedule_milestones()) == (90, 5, (30, 50, 70))
            assert (config.batch_size, config.base_lr) == (1024, 0.1)
            assert config.trust_coefficient == (0.001 if "lars" in config.method else None)
            assert experiment.num_ranks == (64 if config.dataset == "imagenet" else 16)


@pytest.mark.parametrize("name", sorted(path.stem for path in experiments.LISTS.glob("*.toml")))
def test_the_data_of_every_list_hold_several_batches(name: str) -> None:
    for run in runs.runs_of(load_list(name), Path()):
        config = run.config
        assert PROPERTIES[config.dataset].train_size >= 2 * config.batch_size * run.experiment.num_ranks


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
        ({"name": "results.json"}, "names a folder"),
        ({"name": "figures"}, "names a folder"),
        ({"ranks": 2, "simulate_workers": 2}, "exclude each other"),
        ({"ranks": 0}, "at least 1"),
        ({"ranks": True}, "ranks must be an integer"),
        ({"seeds": [1, 1]}, "seeds must be different integers"),
        ({"seeds": [0.5]}, "seeds must be different integers"),
        ({"reference": "x"}, "reference 'x' is none of its runs"),
        ({"runs": {"a/b": {}}}, "a label names a folder"),
        ({"runs": {"_a": {}}}, "a label names a folder"),
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


def test_whole_numbers_stand_for_floats_but_count_layers() -> None:
    settings = {"method": "jointspar", "budget": 1, "lr": 1, "milestones": [2, 3]}
    (experiment,) = parse_list("L", {**MINIMAL, "experiments": [{"name": "one", "runs": {"a": settings}}]}).experiments
    config = experiment.config("a", 0, Path())
    assert [repr(value) for value in (config.budget, config.lr, config.milestones)] == ["1", "1.0", "(2.0, 3.0)"]


def read_back(flags: list[str]) -> TrainConfig:
    options, rest = cli._make_parser().parse_known_args(["train", *flags])
    assert rest == []
    given = {name: value for name, value in vars(options).items() if name != "command"}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    return TrainConfig(**given)


@pytest.mark.parametrize("name", sorted(path.stem for path in experiments.LISTS.glob("*.toml")))
def test_the_command_line_reads_what_the_list_says(tmp_path: Path, name: str) -> None:
    for run in runs.runs_of(load_list(name), tmp_path):
        assert read_back(run.flags()) == run.config


def test_no_milestones_are_none_on_the_command_line_too(tmp_path: Path) -> None:
    content = {**MINIMAL, "experiments": [{"name": "one", "runs": {"a": {"method": "lars", "milestones": []}}}]}
    (run,) = runs.runs_of(parse_list("L", content), tmp_path)
    assert read_back(run.flags()).schedule_milestones() == run.config.schedule_milestones() == ()


def test_flags_say_what_the_list_says(tmp_path: Path) -> None:
    settings = {
        "method": "jointspar",
        "strategy": "shared",
        "distribution": "bandit",
        "shift": True,
        "milestones": [1, 2.5],
        "nesterov": False,
        "overlap": False,
    }
    content = {**MINIMAL, "experiments": [{"name": "one", "simulate_workers": 3, "runs": {"a b": settings}}]}
    (run,) = runs.runs_of(parse_list("L", content), tmp_path)
    assert run.flags() == [
        "--out", str(tmp_path / "one/a-b/seed-0"), "--method", "jointspar",
        "--strategy", "shared", "--distribution", "bandit", "--shift",
        "--milestones", "1.0", "2.5", "--seed", "0", "--simulate-workers", "3",
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
    assert cli.main(["reproduce", "--list", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "not TOML" in capsys.readouterr().err


def test_a_list_that_cannot_be_read_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--list", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err
