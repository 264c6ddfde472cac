"""Ctrl-C in the midst of an iteration, at every line of the library that it runs: training goes on after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import jointspar as js
from jointspar.comm.heads import Op
from jointspar.errors import JointSparError

Line = tuple[str, int]  # file, number
PACKAGE = str(Path(js.__file__).parent)


@contextmanager
def at_each_line(act: Callable[[Line], None]) -> Iterator[None]:
    """Calls act(line) before the library runs a line in this thread."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            act((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Training:
    """Of a toy, of which some layers are inactive in each step."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())))
        sampling = js.Sampling(strategy="independent", p_min=0.2, **settings.pop("sampling", {}))
        self.optimizer = js.JointSparLARS(self.model.named_parameters(), lr=0.1, sampling=sampling, **settings)
        self.x = torch.randn(8, 4)
        self.iterate()

    def iterate(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step(max_norm=1.0)

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def lines_of_an_iteration(settings: dict[str, Any]) -> list[Line]:
    """In the order in which each is first run."""
    lines: dict[Line, None] = {}
    training = Training(**settings)
    with at_each_line(lambda line: lines.setdefault(line)):
        training.iterate()
    return list(lines)


def interrupted_at(wanted: Line, settings: dict[str, Any]) -> Training:
    def interrupt(line: Line) -> None:
        if line == wanted:
            raise KeyboardInterrupt

    training = Training(**settings)
    with pytest.raises(KeyboardInterrupt), at_each_line(interrupt):
        training.iterate()
    return training


@pytest.mark.filterwarnings("ignore:overlap=True. what backward of step")
@pytest.mark.parametrize("settings", [{}, {"sampling": {"lag": 1}}, {"overlap": True}], ids=["plain", "lag", "overlap"])
def test_an_interrupted_iteration_can_be_made_again(settings: dict[str, Any]) -> None:
    """Lines that all have in common are left to the first."""
    lines = lines_of_an_iteration(dict(settings))
    assert len(lines) > 200
    common = set(lines_of_an_iteration({})) if settings else set()
    for line in (line for line in lines if line not in common):
        training = interrupted_at(line, dict(settings))
        before = training.weights()
        steps = training.optimizer.state_dict()["jointspar"]["step"]
        for _ in range(8):
            training.iterate()
        training.optimizer.meet(Op.SAVE)
        training.optimizer.comm.broadcast(torch.zeros(1), 0, what="test")
        own = training.optimizer.state_dict()["jointspar"]
        assert own["trainable"].all(), line
        assert own["step"] == steps + 8, line
        moved = [not torch.equal(now, then) for now, then in zip(training.weights(), before, strict=True)]
        assert all(moved), line


def test_what_a_step_is_left_by_is_what_the_caller_sees() -> None:
    """Also where the transport has failed by it, and the step cannot be made again."""

    def train(comm: js.comm.transport.Transport) -> None:
        training = Training(comm=comm, check_every=1)

        def interrupt(*_: Any, **__: Any) -> None:
            comm.fail("was interrupted")
            raise KeyboardInterrupt

        training.optimizer._pipeline._check_weights = interrupt
        with pytest.raises(KeyboardInterrupt):
            training.iterate()
        raise JointSparError("the end")

    with pytest.raises(JointSparError, match="the end"):
        js.comm.run_simulated(2, train)
