"""The peers of the step benchmark do what they are named after: compared with float64 and with cases worked by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from step.peers import TopK, TorchLars

LARS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, "eps": 1e-8}
SHAPES = [(5, 7), (7,), (3, 2, 2), (1,), (4, 4)]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def expected_lars(w: torch.Tensor, u: torch.Tensor, g: torch.Tensor) -> None:
    """The formula as published, float64, in place on w and u."""
    step = g
    if w.ndim >= 2:
        step = g + LARS["weight_decay"] * w
        if w.norm() > 0 and g.norm() > 0:
            step = step * (
                LARS["trust_coefficient"] * w.norm() / (g.norm() + LARS["weight_decay"] * w.norm() + LARS["eps"])
            )
    u.mul_(LARS["momentum"]).add_(step)
    w.sub_(LARS["lr"] * u)


def test_lars_of_the_peers_is_lars_over_several_steps() -> None:
    random = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=random) for shape in SHAPES]
    params[4].zero_()  # its local rate is 1
    expected = [param.double() for param in params]
    momenta = [torch.zeros_like(w) for w in expected]
    optimizer = TorchLars(params, **LARS)
    for _ in range(3):
        for param, w, u in zip(params, expected, momenta, strict=True):
            param.grad = torch.randn(param.shape, generator=random)
            expected_lars(w, u, param.grad.double())
        optimizer.step()
    for param, w in zip(params, expected, strict=True):
        torch.testing.assert_close(param.double(), w, rtol=1e-5, atol=1e-6)


def test_topk_sends_the_largest_entries_and_keeps_the_others_for_later(group: dist.ProcessGroup) -> None:
    first, second = torch.zeros(2, 2), torch.zeros(3)
    topk = TopK([first, second], group, fraction=0.25)  # one entry of each

    def sent(grad_of_first: list[list[float]], grad_of_second: list[float]) -> list[list[float]]:
        first.grad, second.grad = torch.tensor(grad_of_first), torch.tensor(grad_of_second)
        topk.select()
        topk.exchange()
        topk.scatter()
        return [first.grad.flatten().tolist(), second.grad.tolist()]

    assert sent([[1.0, -4.0], [2.0, 3.0]], [0.5, 0.25, 0.0]) == [[0.0, -4.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    assert topk.residual.tolist() == [1.0, 0.0, 2.0, 3.0, 0.0, 0.25, 0.0]
    assert sent([[0.0, 1.0], [2.0, 0.0]], [0.0, 0.0, -0.125]) == [[0.0, 0.0, 4.0, 0.0], [0.0, 0.25, 0.0]]
    assert topk.residual.tolist() == [1.0, 1.0, 0.0, 3.0, 0.0, 0.0, -0.125]


def test_topk_sends_everything_once(group: dist.ProcessGroup) -> None:
    """What was sent and what is left add up to all gradients."""
    random = torch.Generator().manual_seed(1)
    param = torch.zeros(11, 9)
    topk = TopK([param], group, fraction=0.1)
    total, received = torch.zeros(99, dtype=torch.float64), torch.zeros(99, dtype=torch.float64)
    for _ in range(20):
        param.grad = torch.randn(param.shape, generator=random)
        total += param.grad.double().flatten()
        topk.select()
        topk.exchange()
        topk.scatter()
        assert int((param.grad != 0).sum()) == 10
        received += param.grad.double().flatten()
    torch.testing.assert_close(received + topk.residual.double(), total, rtol=0, atol=1e-5)
