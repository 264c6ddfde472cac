"""`jointspar train --device cuda`: follows a run on the host, and goes on from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import jointspar as js
from device_support import DEVICE
from jointspar.training.config import TrainConfig
from jointspar.training.records import Summary
from jointspar.training.start import train

pytestmark = pytest.mark.cuda

SHORT: dict[str, Any] = {"batch_size": 64, "epochs": 2, "base_lr": 0.4, "threads": 1}


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the host: TensorFloat-32 could tip a draw."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(out: Path, device: str, **changes: Any) -> Summary:
    return train(TrainConfig(out=out, device=device, **(SHORT | changes)))


@pytest.mark.parametrize("method", ["lars", "jointspar-lars", "jointspar", "bf16"])
def test_ten_steps_follow_the_host(tmp_path: Path, method: str) -> None:
    changes = {"method": method, "max_steps": 10} | ({} if "lars" in method else {"base_lr": 0.05})
    for device in ("cpu", DEVICE):
        run(tmp_path / device, device, **changes)
    files = (next((tmp_path / device / "checkpoint").iterdir()) / "shared.safetensors" for device in ("cpu", DEVICE))
    expected, found = map(load_file, files)
    for name, tensor in expected.items():
        difference = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert difference < 0.02, (name, float(difference))


def test_a_run_on_the_device_is_resumed_and_learns(tmp_path: Path) -> None:
    run(tmp_path, DEVICE, max_steps=15)
    summary = run(tmp_path, DEVICE, resume=True)
    assert summary.steps == 44
    assert summary.test_accuracy > 0.3
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 44


def test_a_checkpoint_restores_the_random_state_of_the_device(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3).to(DEVICE)
    optimizer = js.JointSparLARS(model.named_parameters())
    torch.randn(5, device=DEVICE)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    expected = torch.randn(5, device=DEVICE)
    torch.cuda.manual_seed(9)
    js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert torch.equal(torch.randn(5, device=DEVICE), expected)
