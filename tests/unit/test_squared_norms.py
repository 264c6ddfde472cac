"""squared_norms against sums of squares in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jointspar import ops
from support import (
    DTYPES,
    NORM_TOLERANCE,
    SIZES,
    Arrays,
    at_odd_offset,
    bits,
    exact_squared_norm,
    same_bits_on_1_and_2_threads,
)

pytestmark = pytest.mark.usefixtures("backend")


def expected_norms(arrays: Arrays, grads: list) -> list[float]:
    return [exact_squared_norm(arrays.float64(grad)) for grad in grads]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_matches_float64(library: Arrays, rng: np.random.Generator, dtype: str) -> None:
    grads = [library.array(rng.standard_normal(size), dtype) for size in SIZES]
    norms = ops.squared_norms(grads)
    assert library.dtype_name(norms) == "float64"
    np.testing.assert_allclose(library.float64(norms), expected_norms(library, grads), rtol=NORM_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_packed_buffer_match_the_separate_arrays(
    library: Arrays, rng: np.random.Generator, dtype: str
) -> None:
    packed = library.array(rng.standard_normal(sum(SIZES)), dtype)
    offsets = np.cumsum((0, *SIZES))
    slices = [packed[start : start + size] for start, size in zip(offsets, SIZES, strict=False)]
    assert bits(ops.squared_norms(packed, layout=SIZES)) == bits(ops.squared_norms(slices))


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_odd_alignments(library: Arrays, rng: np.random.Generator, offset: int) -> None:
    grads = [at_odd_offset(library, rng.standard_normal(size), "float32", offset) for size in SIZES]
    np.testing.assert_allclose(library.float64(ops.squared_norms(grads)), expected_norms(library, grads), rtol=1e-6)


def test_result_is_in_the_library_of_the_input(library: Arrays) -> None:
    grads = [library.array([3.0, 4.0])]
    norms = ops.squared_norms(grads)
    assert type(norms) is type(grads[0])
    assert norms.tolist() == [25.0]


def test_nothing_gives_nothing(device: str) -> None:
    assert ops.squared_norms([]).shape == (0,)
    assert ops.squared_norms(torch.zeros(0, device=device), layout=[]).shape == (0,)


def test_a_scalar_tensor_is_one_element(library: Arrays) -> None:
    assert ops.squared_norms([library.array(3.0)]).tolist() == [9.0]


def test_dense_permutations_are_read_in_memory_order(device: str, rng: np.random.Generator) -> None:
    image = torch.tensor(rng.standard_normal((4, 3, 5, 7)), dtype=torch.float32, device=device)
    expected = float((image.double() ** 2).sum())
    for grad in (image.to(memory_format=torch.channels_last), image.permute(3, 1, 0, 2)):
        assert float(ops.squared_norms([grad])[0]) == pytest.approx(expected, rel=1e-6)


def test_fortran_order_is_read_in_memory_order(rng: np.random.Generator) -> None:
    grad = np.asfortranarray(rng.standard_normal((12, 35)))
    assert ops.squared_norms([grad])[0] == pytest.approx(math.fsum(grad.ravel() ** 2), rel=1e-12)


@pytest.mark.parametrize(
    "magnitude", [1e-45, 1e-38, 1e-25, 3e-21, 1e-19, 1e18, 1.8e19, 1e25, 3.4e38], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("size", [1, 33, 16384, 100003])
def test_squares_beyond_float32_are_right(library: Arrays, magnitude: float, size: int) -> None:
    grads = [library.array(np.full(size, magnitude))]
    np.testing.assert_allclose(library.float64(ops.squared_norms(grads)), expected_norms(library, grads), rtol=1e-6)


def test_one_large_or_one_tiny_entry_among_ordinary_ones(library: Arrays) -> None:
    values = np.ones(40000)
    values[20000] = 1e25
    many_tiny = np.full(40000, 1e-25)
    many_tiny[7] = 1e-19
    grads = [library.array(values), library.array(many_tiny)]
    np.testing.assert_allclose(library.float64(ops.squared_norms(grads)), expected_norms(library, grads), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 32, 16383, 16384, 100002])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_exactly_where_the_data_is(library: Arrays, dtype: str, position: int, value: float) -> None:
    values = np.ones(100003)
    values[position] = value
    norms = ops.squared_norms([library.array(np.ones(5), dtype), library.array(values, dtype)])
    assert norms[0] == 5.0
    assert (math.isnan if math.isnan(value) else math.isinf)(norms[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_1_and_2_threads(library: Arrays, rng: np.random.Generator, dtype: str) -> None:
    grads = [library.array(rng.standard_normal(size), dtype) for size in (*SIZES, 400_000)]
    assert same_bits_on_1_and_2_threads(lambda: [ops.squared_norms(grads)])


@pytest.mark.host
def test_bits_depend_on_neither_neighbours_nor_place(library: Arrays, rng: np.random.Generator) -> None:
    grad = rng.standard_normal(16385)
    alone = ops.squared_norms([library.array(grad)])[0]
    others = [library.array(rng.standard_normal(size)) for size in (7, 50_000)]
    moved = at_odd_offset(library, grad, "float32", 3)
    assert ops.squared_norms([others[0], moved, others[1]])[1] == alone
