"""The exchanges of the baselines among threads: sums, memory, bytes, state; and the optimizers around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jointspar.errors import JointSparError
from jointspar.step.exchange import Slices
from jointspar.training.baselines import Gathered, PowerSgd, Qsgd, RandomK, ScaledSign, TernGrad, TopK
from late_transport import on_threads

SHAPES = [torch.Size(shape) for shape in ((2, 3), (3,), (20, 5, 10), (0,), (30, 4))]
SIZES = [shape.numel() for shape in SHAPES]
MAKERS: dict[str, Callable[[], Any]] = {
    "topk": lambda: Gathered(TopK(0.1), SIZES, seed=1),
    "signsgd": lambda: Gathered(ScaledSign(), SIZES, seed=1),
    "qsgd": lambda: Gathered(Qsgd(), SIZES, seed=1),
    "terngrad": lambda: Gathered(TernGrad(), SIZES, seed=1),
    "randomk": lambda: RandomK(SIZES, ratio=0.1, seed=1),
    "powersgd": lambda: PowerSgd(SHAPES, rank=2, seed=1),
}
WITH_MEMORY = ("topk", "signsgd", "powersgd")
all_exchanges = pytest.mark.parametrize("name", MAKERS)


def gradients(num_rounds: int, world_size: int, total: int = sum(SIZES)) -> np.ndarray:
    """float32 [num_rounds, world_size, total]: what the ranks hold of the mean gradient."""
    return np.random.default_rng([7, world_size]).standard_normal((num_rounds, world_size, total)).astype(np.float32)


def exchange_all(exchanges: list[Any], given: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Each rank exchanges its rows of `given`; what each got, [num_rounds, world_size, total], and the transports."""
    got = np.full_like(given, np.nan)

    def run(transport: Any) -> None:
        for number, rows in enumerate(given):
            packed = torch.tensor(rows[transport.rank])
            exchanges[transport.rank](transport, packed, what="test")
            got[number, transport.rank] = packed.numpy()

    return got, on_threads(len(exchanges), run)


def split(row: np.ndarray) -> list[np.ndarray]:
    return np.split(row, np.cumsum(SIZES)[:-1])


@all_exchanges
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_get_the_same_bits(name: str, world_size: int) -> None:
    got, _ = exchange_all([MAKERS[name]() for _ in range(world_size)], gradients(4, world_size))
    assert np.isfinite(got).all()
    assert (got == got[:, :1]).all()
    assert got.any(axis=-1).all()


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("world_size", [1, 3])
def test_what_was_sent_and_what_is_remembered_are_all_gradients(name: str, world_size: int) -> None:
    given = gradients(6, world_size)
    exchanges = [MAKERS[name]() for _ in range(world_size)]
    got, _ = exchange_all(exchanges, given)
    memories = [exchange.state_dict()["memory"].double().numpy() for exchange in exchanges]
    assert all(memory.any() for memory in memories)
    total = given.sum(axis=(0, 1), dtype=np.float64)
    np.testing.assert_allclose(got[:, 0].sum(axis=0, dtype=np.float64) + sum(memories), total, atol=2e-5)


def test_gathered_top_k_is_the_sum_of_what_each_rank_keeps() -> None:
    given, memory = gradients(3, 2), np.zeros((2, sum(SIZES)))
    got, _ = exchange_all([MAKERS["topk"]() for _ in range(2)], given)
    for number, rows in enumerate(given):
        wanted, sent = rows + memory, np.zeros_like(memory)
        for rank in range(2):
            parts = []
            for part in split(wanted[rank]):
                kept = np.argsort(-abs(part))[: max(1, round(0.1 * part.size))]
                parts.append(np.where(np.isin(np.arange(part.size), kept), part, 0.0))
            sent[rank] = np.concatenate(parts)
        memory = wanted - sent
        np.testing.assert_allclose(got[number, 0], sent.sum(axis=0), atol=1e-6)


def test_random_k_sums_the_same_elements_of_all_ranks_times_what_is_left_out() -> None:
    given = gradients(3, 3)
    got, _ = exchange_all([MAKERS["randomk"]() for _ in range(3)], given)
    for number in range(3):
        for part, whole in zip(split(got[number, 0]), split(given[number].sum(axis=0, dtype=np.float64)), strict=True):
            num_kept = min(part.size, max(1, round(0.1 * part.size)))
            kept = part != 0
            assert kept.sum() == num_kept
            np.testing.assert_allclose(part[kept], whole[kept] * (part.size / max(1, num_kept)), rtol=1e-5, atol=1e-5)
    assert ((got[0, 0] != 0) != (got[1, 0] != 0)).any()


def test_random_k_is_unbiased() -> None:
    num_draws = 4000
    values = np.random.default_rng(2).uniform(-1, 1, 30).astype(np.float32)
    draws, _ = exchange_all([RandomK([20, 10], ratio=0.2, seed=4)], np.tile(values, (num_draws, 1, 1)))
    standard_errors = draws[:, 0].std(axis=0) / math.sqrt(num_draws)
    assert (abs(draws[:, 0].mean(axis=0, dtype=np.float64) - values) <= 4 * standard_errors).all()


def orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Gram-Schmidt, column after column."""
    columns: list[np.ndarray] = []
    for column in matrix.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / np.sqrt(column @ column))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_powersgd_is_one_power_iteration_a_step_with_warm_start(world_size: int) -> None:
    given = gradients(4, world_size)
    exchanges = [MAKERS["powersgd"]() for _ in range(world_size)]
    q_of = dict(zip((2, 4), np.split(exchanges[0].state_dict()["q"].double().numpy(), [100]), strict=True))
    q_of = {index: flat.reshape(-1, 2) for index, flat in q_of.items()}  # of (20, 50) and (30, 4)
    got, _ = exchange_all(exchanges, given)
    memory = np.zeros((world_size, sum(SIZES)))
    for number, rows in enumerate(given):
        wanted = rows + memory
        expected = split(wanted.sum(axis=0))
        for index, q in q_of.items():
            matrices = [split(row)[index].reshape(SHAPES[index][0], -1) for row in wanted]
            p = orthonormal(sum(matrix @ q for matrix in matrices))
            q_of[index] = sum(matrix.T @ p for matrix in matrices)
            expected[index] = (p @ q_of[index].T).reshape(-1)
        np.testing.assert_allclose(got[number, 0], np.concatenate(expected), atol=2e-4)
        own = [np.concatenate([part / world_size for part in expected])] * world_size
        memory = wanted - own
        for index in (0, 1, 3):  # not compressed
            start = sum(SIZES[:index])
            memory[:, start : start + SIZES[index]] = 0.0
    np.testing.assert_allclose([e.state_dict()["memory"].numpy() for e in exchanges], memory, atol=2e-4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # sizes 6, 3, 1000: bytes of a message, times the two other ranks
        (lambda sizes, _: Gathered(TopK(0.01), sizes, seed=0), 3 * 2 * 8 * (1 + 1 + 10)),
        (lambda sizes, _: Gathered(ScaledSign(), sizes, seed=0), 3 * 2 * (5 + 5 + 129)),
        (lambda sizes, _: Gathered(Qsgd(7), sizes, seed=0), 3 * 2 * (7 + 6 + 8 + 500)),
        (lambda sizes, _: Gathered(Qsgd(127), sizes, seed=0), 3 * 2 * (10 + 7 + 8 + 1000)),
        (lambda sizes, _: Gathered(TernGrad(), sizes, seed=0), 3 * 2 * (6 + 5 + 254)),
        # a ring of three ranks sends 2 * (3 - 1) times the buffer, all ranks together
        (lambda sizes, _: RandomK(sizes, ratio=0.01, seed=0), 4 * 4 * (1 + 1 + 10)),
        # P of 20 x 2 with the 6 + 3 that are sent as they are, then Q of 50 x 2
        (lambda _, shapes: PowerSgd(shapes, rank=2, seed=0), 4 * 4 * (40 + 6 + 3) + 4 * 4 * 100),
    ],
)
def test_the_transport_counts_the_compressed_bytes(make: Callable[[Any, Any], Any], expected: int) -> None:
    shapes = [(2, 3), (3,), (20, 50)]
    sizes = [6, 3, 1000]
    _, transports = exchange_all([make(sizes, shapes) for _ in range(3)], gradients(2, 3, sum(sizes)))
    assert sum(transport.bytes_sent for transport in transports) == 2 * expected


@pytest.mark.parametrize("name", [*WITH_MEMORY, "qsgd", "terngrad"])
def test_a_nan_of_one_rank_reaches_all_and_stays_in_no_memory(name: str) -> None:
    given = gradients(3, 2)
    given[1, 1, 700] = np.nan
    exchanges = [MAKERS[name]() for _ in range(2)]
    got, _ = exchange_all(exchanges, given)
    assert np.isfinite(got).all(axis=-1).tolist() == [[True, True], [False, False], [True, True]]
    assert all(tensor.isfinite().all() for exchange in exchanges for tensor in exchange.state_dict().values())


@all_exchanges
def test_a_continuation_gives_the_same_bits(name: str) -> None:
    given = gradients(6, 2)
    whole, _ = exchange_all([MAKERS[name]() for _ in range(2)], given)
    first = [MAKERS[name]() for _ in range(2)]
    exchange_all(first, given[:3])
    second = [MAKERS[name]() for _ in range(2)]
    for old, new in zip(first, second, strict=True):
        assert old.agreed() != new.agreed()
        new.check_state(old.state_dict())
        new.load_state_dict(old.state_dict())
        assert old.agreed() == new.agreed()
    rest, _ = exchange_all(second, given[3:])
    assert (rest == whole[3:]).all()


@all_exchanges
def test_random_numbers_and_choices_follow_the_seed(name: str) -> None:
    assert "seed=1" in MAKERS[name]().agreed()


def test_ranks_round_by_random_numbers_of_their_own() -> None:
    exchanges = [Gathered(Qsgd(1), [1000], seed=0) for _ in range(2)]
    same = np.tile(gradients(1, 1, 1000), (1, 2, 1))
    got, _ = exchange_all(exchanges, same)
    scale = abs(same[0, 0, :512]).max()
    assert set(np.unique(np.round(abs(got[0, 0, :512]) / scale))) == {0.0, 1.0, 2.0}  # 1: one of two rounded up


@all_exchanges
def test_states_of_other_parameters_or_methods_are_refused(name: str) -> None:
    exchange = MAKERS[name]()
    other = Gathered(TopK(), [5], seed=1) if name in WITH_MEMORY else Gathered(TopK(), SIZES, seed=1)
    for state in ({}, other.state_dict(), exchange.state_dict() | {"round": torch.zeros(2)}):
        with pytest.raises(ValueError, match=f"is not of {name}"):
            exchange.check_state(state)


@all_exchanges
def test_steps_that_leave_parameters_out_are_refused(name: str) -> None:
    some = Slices(np.array(SIZES[1:]), np.ones((1, len(SIZES) - 1), dtype=bool))
    partly = Slices(np.array(SIZES), np.array([[True] * 4 + [False]]))
    for slices in (some, partly):
        with pytest.raises(JointSparError, match="all parameters in every step"):
            MAKERS[name]()(js.comm.local(), torch.zeros(int(slices.sizes.sum())), what="test", slices=slices)


def train(optimizer: Any, model: nn.Module, num_steps: int = 5) -> torch.Tensor:
    for step in range(num_steps):
        optimizer.zero_grad()
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", [js.JointSparSGD, js.JointSparLARS])
@pytest.mark.parametrize("lossless", ["topk of everything", "powersgd of full rank"])
def test_optimizers_apply_what_was_decoded(kind: Any, lossless: str) -> None:
    dense, compressed = make_model(), make_model()
    shapes = [parameter.shape for parameter in dense.parameters()]
    exchange: Any = Gathered(TopK(1.0), [shape.numel() for shape in shapes], seed=0)
    if lossless.startswith("powersgd"):
        exchange = PowerSgd(shapes, rank=8, seed=0)
    settings: Any = {"sampling": js.Sampling(budget=1.0, strategy="shared"), "comm": js.comm.local()}
    plain = kind(dense.named_parameters(), **settings)
    other = kind(compressed.named_parameters(), exchange=exchange, **settings)
    assert torch.equal(train(plain, dense), train(other, compressed))
    assert other.stats.exchange == exchange.name and other.is_rank_local and not plain.is_rank_local
    assert not train(other, compressed).equal(train(plain, dense, 4))


def test_a_state_of_another_exchange_changes_nothing() -> None:
    model = make_model()
    sizes = [parameter.numel() for parameter in model.parameters()]
    settings: Any = {"sampling": js.Sampling(budget=1.0, strategy="shared"), "comm": js.comm.local()}
    signs = js.JointSparSGD(model.named_parameters(), exchange=Gathered(ScaledSign(), sizes, seed=0), **settings)
    rounded = js.JointSparSGD(model.named_parameters(), exchange=Gathered(Qsgd(), sizes, seed=0), **settings)
    before = train(rounded, model)
    with pytest.raises(ValueError, match="is not of qsgd"):
        rounded.load_state_dict(signs.state_dict())
    assert before.equal(torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]))
    assert rounded._pipeline.step_count == 5
