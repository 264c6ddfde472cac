"""What `jointspar reproduce` makes of the runs: results.json, the table, the figures and the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fake_training import reproduce, write_list
from jointspar import cli
from jointspar.training.reproduce import figures, results


@pytest.fixture
def drawn() -> None:
    """Asked for by tests that look at the files of figures."""


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they take most of the time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda experiment: [])


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
        "50 %",
    )  # fmt: skip
    assert rows[0].points is None
    assert rows[1].points == pytest.approx(-5.0)


def test_epochs_of_which_a_continued_run_had_only_the_end_count_as_no_time() -> None:
    epochs = [{"phase_ms": {"forward": 2.0, "backward": 4.0}}, {"phase_ms": {}}, {"phase_ms": {"forward": 4.0}}]
    assert figures._phase_ms({"seeds": [{"epochs": epochs}]}) == {"forward": 3.0, "backward": 2.0}


def test_points_are_over_the_seeds_that_both_runs_have(fake_training: Path) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    (out / "one/half/seed-1/summary.json").unlink()
    assert reproduce(path, out, "--report") == 0
    _, half = results.table(json.loads((out / "results.json").read_text())["experiments"][0])
    assert (half.seeds, half.points) == ("1", pytest.approx(-5.0))


def test_the_report_says_what_the_runs_were_made_with(fake_training: Path) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    note = out / "one/half/seed-1/run.json"
    content = json.loads(note.read_text())
    content["made_with"][0] |= {"processor": "Abacus", "commit": "0123456789abcdef+"}
    note.write_text(json.dumps(content))
    assert reproduce(path, out) == 0
    page = (out / "report.html").read_text()
    assert re.search(r"Abacus, \d+ cores · jointspar .*<br>", page)
    assert re.search(r"half: \{.*\} · sums by ring · seed 0: commit .* · seed 1: commit 0123456789\+\n", page)


def test_runs_of_different_data_are_not_compared(fake_training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    for label, data in (("dense", "60 + 10 images, 0a"), ("half", "30 + 10 images, 0b")):
        summary = out / f"one/{label}/seed-1/summary.json"
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "data": data}))
    assert reproduce(path, out, "--report") == cli.EXIT_USAGE
    error = capsys.readouterr().err
    assert "one: runs of 'dense' saw 60 + 10 images, 0a, runs of 'half' 30 + 10 images, 0b" in error


def test_a_lost_seed_is_counted_and_left_out_of_means(fake_training: Path) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training, seeds="[0, 1, 9]"), out) == 0
    rows = results.table(json.loads((out / "results.json").read_text())["experiments"][0])
    assert [row.seeds for row in rows] == ["3, 1 lost"] * 2
    assert rows[1].cells[0] == "85.50 % (85.00 % to 86.00 %)"
    assert rows[1].points == pytest.approx(-5.0)


def test_where_all_seeds_are_lost_the_table_gives_them(fake_training: Path) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training, seeds="[9]"), out) == 0
    rows = results.table(json.loads((out / "results.json").read_text())["experiments"][0])
    assert (rows[0].seeds, rows[0].cells[0]) == ("1, 1 lost", "19.00 %")


def test_what_failed_is_counted_and_told_until_it_is_mended(fake_training: Path) -> None:
    out, methods = fake_training / "out", '"bad" = { method = "sgd" }\n"frail" = { method = "topk" }\n'
    assert reproduce(write_list(fake_training, methods), out) == 1
    experiment = json.loads((out / "results.json").read_text())["experiments"][0]
    assert [row.seeds for row in results.table(experiment)] == ["2", "2", "1, 1 failed"]
    page = (out / "report.html").read_text()
    assert all(f"Failed: {who}: failed with exit code 3<br>" in page
               for who in ("bad, seed 0", "bad, seed 1", "frail, seed 1"))  # fmt: skip
    assert reproduce(write_list(fake_training, methods.replace("sgd", "lars").replace("topk", "lars")), out) == 2
    shutil.rmtree(out / "one/frail")
    assert reproduce(write_list(fake_training, methods.replace("sgd", "lars").replace("topk", "lars")), out) == 0
    assert "Failed" not in (out / "report.html").read_text()


def test_steps_that_were_skipped_are_told(fake_training: Path) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    summary = out / "one/half/seed-1/summary.json"
    summary.write_text(summary.read_text().replace('"skipped_steps": 0', '"skipped_steps": 3'))
    assert reproduce(path, out, "--report") == 0
    found = json.loads((out / "results.json").read_text())["experiments"][0]
    place = [column.title for column in results.columns(found)].index("skipped steps")
    assert [row.cells[place] for row in results.table(found)] == ["0", "1.5 (0 to 3)"]


def test_figures_of_what_is_no_longer_reported_are_removed(fake_training: Path, drawn: None) -> None:
    path, out = write_list(fake_training), fake_training / "out"
    assert reproduce(path, out) == 0
    path.write_text(path.read_text().replace('name = "one"', 'name = "two"'))
    assert reproduce(path, out) == 0
    assert {place.name[:4] for place in (out / "figures").iterdir()} == {"two-"}


@pytest.fixture
def experiment(fake_training: Path) -> dict[str, Any]:
    """What results.json says of two runs."""
    out = fake_training / "out"
    assert reproduce(write_list(fake_training), out) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())["experiments"][0]
    return found


def test_every_run_is_drawn_however_many(experiment: dict[str, Any]) -> None:
    many = [{**experiment["runs"][0], "label": str(number)} for number in range(31)]
    assert len(figures._draw_learning({**experiment, "runs": many}).axes[0].lines) == 31


@pytest.mark.parametrize(("frugal", "scale"), [(1000, "linear"), (200, "log")])
def test_traffic_is_drawn_so_that_frugal_runs_are_seen(experiment: dict[str, Any], frugal: int, scale: str) -> None:
    experiment["runs"][1]["seeds"][0]["summary"]["bytes_sent"] = frugal  # and up to 4000 by others
    assert [axes.get_xscale() for axes in figures._draw_learning(experiment).axes[:3]] == ["linear", "linear", scale]


def test_the_end_shows_each_seed_and_the_mean(experiment: dict[str, Any]) -> None:
    axes = figures._draw_end(experiment).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dense", "half"]
    shown = [round(float(x), 9) for line in axes.lines for x in line.get_xdata()]
    assert shown == [90, 91, 90.5, 90.5, 90.5, 85, 86, 85.5]


def test_a_lost_seed_does_not_squeeze_the_others(experiment: dict[str, Any]) -> None:
    experiment["runs"][1]["seeds"][0]["summary"]["test_accuracy"] = 0.1
    axes = figures._draw_end(experiment).axes[0]
    assert axes.get_xlim()[0] > 80
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in crosses] == [[1]]


def test_probabilities_name_the_layers(experiment: dict[str, Any]) -> None:
    axes = figures._draw_probabilities(experiment["runs"][1:]).axes[0]
    assert axes.get_title(loc="left") + axes.get_title() == "half"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "head"]


def test_the_report_needs_no_other_file(fake_training: Path, drawn: None) -> None:
    out = fake_training / "out"
    assert reproduce(write_list(fake_training), out) == 0
    page = (out / "report.html").read_text()
    assert "Small &lt;list&gt;" in page
    assert "85.50 % (85.00 % to 86.00 %)" in page and "-5.00" in page
    assert page.count('src="data:image/png;base64,') == 4 == len(list((out / "figures").glob("*.png")))
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
