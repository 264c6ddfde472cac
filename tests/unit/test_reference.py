"""The reference backend against torch.optim, integers and hand-computed cases: what all other tests trust."""

from __future__ import annotations

import ast
import inspect
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from jointspar.backends import checked_calls, flat_arrays, host_calls, native, reference, reference_probabilities

MODULES = (reference, reference_probabilities, checked_calls, host_calls, flat_arrays)
NAN = math.nan


def hyper(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def lars(params: list, momenta: list, grads: Any, rows: np.ndarray, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    unknown = np.full(len(params), NAN)
    known = {"adapt": np.ones(len(params), bool), "nesterov": False, "param_norms": unknown, "grad_norms": unknown}
    return reference.lars_update(params, momenta, grads, hyper=rows, **{**known, **changes})


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_it_imports_nothing_but_its_own_parts_torch_and_numpy(module: ModuleType) -> None:
    allowed = {"__future__", "collections.abc", "dataclasses", "typing", "math", "numpy", "torch"}
    allowed |= {other.__name__ for other in MODULES}
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert imported <= allowed


def test_it_has_the_functions_and_argument_names_of_the_native_backend() -> None:
    assert reference.__all__ == native.__all__
    for name in reference.__all__:
        function = getattr(reference, name)
        signature = (getattr(native, name).__doc__ or "").partition("\n")[0]
        missing = [argument for argument in inspect.signature(function).parameters if argument not in signature]
        assert not missing, f"{name}: {signature}"


def test_its_philox_agrees_with_plain_integers(rng: np.random.Generator) -> None:
    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
            high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return counter

    for _ in range(20):
        seed, step, rank = (int(rng.integers(0, 2**bits, dtype=np.uint64)) for bits in (63, 32, 32))
        values = reference_probabilities.random_bits(seed, step, rank, 5, reference_probabilities.LAYER_ORDER)
        for layer, value in enumerate(values.tolist()):
            words = philox([step, rank, layer, 1], [seed % 2**32, seed >> 32])
            assert value == words[0] + (words[1] << 32)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torch_sgd(momentum: float, nesterov: bool) -> None:
    torch.manual_seed(1)
    params = [torch.randn(3, 4, dtype=torch.float64), torch.randn((), dtype=torch.float64)]
    expected = [torch.nn.Parameter(param.clone()) for param in params]
    momenta = [torch.zeros_like(param) for param in params]
    can_nesterov = nesterov and momentum > 0
    optimizer = torch.optim.SGD(expected, lr=0.1, momentum=momentum, weight_decay=0.01, nesterov=can_nesterov)
    for _ in range(5):
        grads = [torch.randn_like(param) for param in params]
        for parameter, grad in zip(expected, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        rows = hyper((0.1, momentum, 0.01), (0.1, momentum, 0.01))
        norms = reference.sgd_update(params, momenta, grads, hyper=rows, nesterov=can_nesterov)
        np.testing.assert_allclose(norms, [grad.norm().item() for grad in grads], rtol=1e-14)
    for param, parameter in zip(params, expected, strict=True):
        torch.testing.assert_close(param, parameter.data, rtol=1e-13, atol=0.0)


def test_lars_by_hand() -> None:
    """||w|| = 5, ||g|| = 10: local = 0.1 * 5 / (10 + 0.2 * 5 + 1) = 1/24; d = (g + 0.2 w) / 24; u = 0.5 u + d."""
    param, velocity = np.array([3.0, 4.0]), np.array([1.0, 0.0])
    norms, after = lars([param], [velocity], [np.array([6.0, -8.0])], hyper((2.0, 0.5, 0.2, 0.1, 1.0)))
    np.testing.assert_allclose(velocity, [0.5 + 6.6 / 24, -7.2 / 24], rtol=1e-15)
    np.testing.assert_allclose(param, [3.0 - 2 * (0.5 + 6.6 / 24), 4.0 + 2 * 7.2 / 24], rtol=1e-15)
    np.testing.assert_allclose([norms[0], after[0]], [10.0, np.hypot(*param)], rtol=1e-15)


def test_lars_nesterov_by_hand() -> None:
    """local = 1 without adapt: d = 2, u = 0.5 * 4 + 2 = 4, w -= 0.1 * (2 + 0.5 * 4)."""
    param, velocity = np.array([1.0]), np.array([4.0])
    no_adapt = np.array([False])
    lars([param], [velocity], [np.array([2.0])], hyper((0.1, 0.5, 0.0, 1.0, 0.0)), adapt=no_adapt, nesterov=True)
    np.testing.assert_allclose([param[0], velocity[0]], [0.6, 4.0], rtol=1e-15)


def test_known_norms_are_used_and_a_missing_gradient_is_zeros() -> None:
    rows = hyper((1.0, 0.0, 0.5, 0.1, 0.0), (1.0, 0.0, 0.5, 0.1, 0.0))
    params, momenta = [np.array([2.0]), np.array([2.0])], [np.zeros(1), np.zeros(1)]
    norms, _ = lars(
        params,
        momenta,
        [np.array([1.0]), None],
        rows,
        param_norms=np.array([8.0, NAN]),
        grad_norms=np.array([4.0, NAN]),
    )
    # local = 0.1 * 8 / (4 + 0.5 * 8) = 0.1 from the given norms, and 1 for a gradient of zeros
    np.testing.assert_allclose(params, [[2.0 - 0.1 * 2.0], [2.0 - 1.0]], rtol=1e-15)
    np.testing.assert_array_equal(norms, [4.0, 0.0])


def test_a_packed_gradient_is_split_in_order() -> None:
    params = [np.zeros((2, 1), np.float32), np.zeros(0, np.float32), np.zeros((), np.float32)]
    momenta = [np.zeros_like(param) for param in params]
    rows = hyper(*[(1.0, 0.0, 0.0)] * 3)
    norms = reference.sgd_update(params, momenta, np.array([3.0, 4.0, 5.0]), hyper=rows, nesterov=False)
    np.testing.assert_array_equal(params[0], [[-3.0], [-4.0]])
    assert float(params[2]) == -5.0
    np.testing.assert_array_equal(norms, [5.0, 0.0, 5.0])


def test_pack_scales_in_float32_and_rounds_once() -> None:
    source = torch.tensor([1.0, 1 + 2.0**-23, 3.0], dtype=torch.float32)
    packed = torch.empty(3, dtype=torch.bfloat16)
    norms = reference.pack_gradients([source], np.array([1 / 3]), np.array([3]), packed)
    assert torch.equal(packed, (source * torch.tensor(1 / 3)).to(torch.bfloat16))
    np.testing.assert_allclose(norms, [float((source.double() ** 2).sum())], rtol=1e-15)


def test_pack_in_float64_keeps_float64() -> None:
    packed = np.empty(2)
    reference.pack_gradients([np.array([1.0, 3.0], np.float32)], np.array([1 / 3]), np.array([2]), packed)
    np.testing.assert_array_equal(packed, np.array([1.0, 3.0]) * (1 / 3))


def test_unpack_and_add_of_16_bit_types_round_in_float32() -> None:
    out = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    reference.add_packed(out, torch.tensor([1.0, 2.0**-8], dtype=torch.bfloat16))
    assert out.tolist() == [256.0, 1.0]  # ties go to even
    targets = [torch.tensor(1.0, dtype=torch.float16), torch.empty(1, dtype=torch.float64)]
    reference.unpack_gradients(torch.tensor([2.0, 7.0]), targets[:1] + targets[1:], add=False)
    assert [target.item() for target in targets] == [2.0, 7.0]
    reference.unpack_gradients(torch.tensor([2.0, 7.0]), targets, add=True)
    assert [target.item() for target in targets] == [4.0, 14.0]


def test_elements_are_taken_in_memory_order() -> None:
    image = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    channels_last = image.to(memory_format=torch.channels_last)
    fortran = np.asfortranarray(image.numpy())
    for array, expected in (
        (channels_last, image.permute(0, 2, 3, 1).flatten().numpy()),
        (fortran, image.numpy().flatten(order="F")),
    ):
        packed = np.empty(image.numel(), np.float32)
        reference.pack_gradients([array], np.ones(1), np.array([image.numel()]), packed)
        np.testing.assert_array_equal(packed, expected)


def test_read_only_gradients_are_read_and_results_stay_out_of_autograd() -> None:
    grad = np.ones(3, np.float32)
    grad.setflags(write=False)
    param = torch.nn.Parameter(torch.ones(3))
    version = param._version
    reference.sgd_update([param], [torch.zeros(3)], [grad], hyper=hyper((1.0, 0.0, 0.0)), nesterov=False)
    assert param.tolist() == [0.0] * 3
    assert param.grad_fn is None
    assert param._version > version
    np.testing.assert_array_equal(grad, 1.0)


def test_squared_norms_of_lists_slices_zero_size_and_0d_arrays() -> None:
    arrays = [torch.tensor(3.0), torch.empty(0, 4), torch.full((2, 2), 2.0, dtype=torch.bfloat16)]
    np.testing.assert_array_equal(reference.squared_norms(arrays, None), [9.0, 0.0, 16.0])
    np.testing.assert_array_equal(reference.squared_norms(np.array([1.0, 2.0, 3.0]), np.array([1, 0, 2])), [1, 0, 13])
    np.testing.assert_array_equal(reference.squared_norms([], None), [])


def test_squared_norms_of_float32_do_not_overflow() -> None:
    np.testing.assert_allclose(reference.squared_norms([np.full(2, 1e30, np.float32)], None), [2e60], rtol=1e-6)
    assert np.isnan(reference.squared_norms([torch.tensor([1.0, NAN])], None)[0])


def update_call(**changes: Any) -> dict[str, Any]:
    pair = {name: [np.ones(3, np.float32), np.ones(3, np.float32)] for name in ("params", "momenta", "grads")}
    return {**pair, "hyper": hyper((0.1, 0.9, 0.0), (0.1, 0.9, 0.0)), "nesterov": False, **changes}


SHARED = np.ones(6, np.float32)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, r"params\[1\]", {"params": [np.ones(3, np.float32), None]}),
        (TypeError, r"params\[1\]", {"params": [np.ones(3, np.float32), np.ones(3, np.int32)]}),
        (ValueError, r"params\[1\].*dense", {"params": [np.ones(3, np.float32), np.ones(6, np.float32)[::2]]}),
        (ValueError, r"params\[0\].*read-only", {"params": [np.broadcast_to(np.float32(1), 1), SHARED[:3]]}),
        (ValueError, r"params\[1\].*meta", {"params": [np.ones(3, np.float32), torch.ones(3, device="meta")]}),
        (TypeError, r"params\[1\].*sparse", {"params": [np.ones(3, np.float32), torch.ones(3).to_sparse()]}),
        (TypeError, r"momenta\[0\].*float32", {"momenta": [np.ones(3), np.ones(3, np.float32)]}),
        (ValueError, r"momenta\[0\].*shape", {"momenta": [np.ones(4, np.float32), np.ones(3, np.float32)]}),
        (ValueError, r"grads\[1\].*shape", {"grads": [None, np.ones((3, 1), np.float32)]}),
        (ValueError, "grads: 1 entries", {"grads": [None]}),
        (ValueError, "params.*7", {"grads": np.ones(7, np.float32)}),
        (ValueError, "hyper", {"hyper": hyper((0.1, 0.9, 0.0))}),
        (ValueError, r"(params|momenta)\[.\].*overlaps (params|momenta)\[.\]", {"momenta": [SHARED[:3], SHARED[:3]]}),
        (ValueError, r"params\[1\].*overlaps grads\[0\]",
         {"grads": [SHARED[1:4], None], "params": [np.ones(3, np.float32), SHARED[2:5]]}),
    ],
)  # fmt: skip
def test_bad_arrays_are_refused_by_name_before_anything_is_written(
    error: type[Exception], match: str, changes: dict[str, Any]
) -> None:
    call = update_call(**changes)
    with pytest.raises(error, match=match):
        reference.sgd_update(**call)
    for array in [*call["params"], *call["momenta"]]:
        if isinstance(array, np.ndarray):
            assert (array == 1).all()


def test_gradients_that_are_only_read_may_share_memory() -> None:
    norms = reference.sgd_update(**update_call(grads=[SHARED[:3], SHARED[1:4]]))
    np.testing.assert_allclose(norms, [math.sqrt(3)] * 2)


def test_strides_that_differ_are_refused_for_arrays_that_belong_together() -> None:
    grad = np.asfortranarray(np.ones((2, 3), np.float32))
    square = [np.ones((2, 3), np.float32)]
    with pytest.raises(ValueError, match=r"grads\[0\].*strides"):
        reference.sgd_update(square, [square[0].copy()], [grad], hyper=hyper((0.1, 0.9, 0.0)), nesterov=False)


@pytest.mark.parametrize(("sizes", "packed_size"), [([2, 1], 3), ([3, 1], 4), ([3], 3), ([4, -1], 3), ([2, 2], 3)])
def test_sizes_that_do_not_fit_are_refused(sizes: list[int], packed_size: int) -> None:
    grads = [np.ones(2, np.float32), np.ones(2, np.float32)]
    with pytest.raises(ValueError, match=r"sizes|grads"):
        reference.pack_gradients(grads, np.ones(2), np.array(sizes), np.empty(packed_size, np.float32))
