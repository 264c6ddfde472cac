"""Stands for `jointspar train` under `jointspar reproduce`: runs end at once, with numbers that a test knows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jointspar import cli
from jointspar.training.reproduce import runs

# Two epochs at once, with numbers that depend on seed and method in a known way.
FAKE_TRAIN = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, seed, method = Path(flags["--out"]), int(flags["--seed"]), flags["--method"]
if method == "sgd" or (method == "topk" and seed == 1):
    print("no luck today")
    sys.exit(3)
(out / "calls").open("a").write("called\\n")
accuracy = {"lars": 0.90, "jointspar-lars": 0.85, "topk": 0.80}[method] + 0.01 * seed
if seed == 9:
    accuracy = 0.19  # of ten classes
line = {"kind": "epoch", "epoch": 1, "step": 5, "train_loss": 0.5, "test_accuracy": accuracy / 2, "seconds": 2.0,
        "bytes_sent": 100, "active_fraction": 0.5, "phase_ms": {"forward": 1.0, "exchange": 2.0}}
step = {"kind": "step", "epoch": 0.5, "step": 3, "probabilities": [0.25, 1.0]}
last = {**step, "epoch": 1, "probabilities": [0.5, 0.75]}
end = {**line, "epoch": 2, "test_accuracy": accuracy, "seconds": 4.0, "bytes_sent": 2000}
(out / "metrics.jsonl").write_text("".join(json.dumps(each) + "\\n" for each in (step, last, line, end)))
summary = {"test_accuracy": accuracy, "train_loss": None if seed == 2 else 0.25, "seconds": 4.0 + seed,
           "dataset": "digits", "exchange": "ring", "skipped_steps": 0, "bytes_sent": 2000 + 2000 * seed,
           "active_fraction": 0.5, "layers": ["conv", "head"]}
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


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end at once, and are started without their `env -n 2`."""
    script = folder / "fake_train.py"
    script.write_text(FAKE_TRAIN)
    monkeypatch.setattr(runs, "train_command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(runs, "find_launcher", lambda: "env")
    real = runs.command
    monkeypatch.setattr(runs, "command", lambda run, launcher: real(run, launcher)[3 * run.needs_launcher :])


def reproduce(path: Path, out: Path, *more: str) -> int:
    return cli.main(["reproduce", "--list", str(path), "--out", str(out), *more])
