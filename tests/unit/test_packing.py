"""Layout and scales of the packed gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from jointspar.step.packing import Packer, gradient_scales


def make():
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 2))]
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(index + 1))
    return parameters, Packer(parameters, ["a", "b", "c"], None)


def test_wanted_gradients_are_concatenated_scaled_and_measured():
    _, packer = make()
    layout = packer.layout(np.array([[True, False, True]]))
    packed, squared_norms = packer.pack(layout, np.array([True, True, True]), np.array([2.0, 9.0, 0.5]))
    assert packed.tolist() == [2.0] * 6 + [1.5] * 4
    assert squared_norms.tolist() == [6.0, 36.0]


def test_what_another_rank_computes_packs_zeros_here():
    parameters, packer = make()
    parameters[0].grad.fill_(float("nan"))
    layout = packer.layout(np.array([[True, False, False], [False, True, False]]))
    packed, squared_norms = packer.pack(layout, np.array([False, True, True]), np.ones(3))
    assert packed.tolist() == [0.0] * 6 + [2.0] * 4
    assert squared_norms.tolist() == [0.0, 16.0]


def test_slices_of_the_same_ranks_lie_together_and_all_keep_the_parameters_order_where_all_compute_all():
    parameters = [nn.Parameter(torch.zeros(size)) for size in (5, 6, 7, 8, 9)]
    packer = Packer(parameters, list("abcde"), None)
    assert packer.layout(np.ones((3, 5), dtype=bool)).positions.tolist() == [0, 1, 2, 3, 4]
    layout = packer.layout(np.array([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0]], dtype=bool))
    assert layout.positions.tolist() == [0, 2, 1, 3]
    assert layout.sizes.tolist() == [5, 7, 6, 8] and layout.total == 26
    assert layout.computed.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_views_have_the_parameters_shapes_and_memory_order():
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weight.grad = torch.randn(4, 3, 2, 2)
    packer = Packer([weight], ["conv.weight"], None)
    layout = packer.layout(np.array([[True]]))
    packed, _ = packer.pack(layout, np.array([True]), np.ones(1))
    assert torch.equal(packer.unpack_views(layout, packed)["conv.weight"], weight.grad)


def test_an_active_parameter_without_gradient_packs_zeros_and_warns_once():
    parameters, packer = make()
    parameters[1].grad = None
    layout = packer.layout(np.ones((1, 3), dtype=bool))
    with pytest.warns(UserWarning, match="b was active but got no gradient"):
        packed, squared_norms = packer.pack(layout, np.ones(3, dtype=bool), np.ones(3))
    assert packed[6:10].tolist() == [0.0] * 4 and squared_norms[1] == 0.0
    packer.pack(layout, np.ones(3, dtype=bool), np.ones(3))


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    packer = Packer([embedding.weight], ["embed.weight"], None)
    with pytest.raises(ValueError, match=r"embed\.weight has a sparse gradient"):
        packer.pack(packer.layout(np.array([[True]])), np.array([True]), np.ones(1))


def test_the_wire_is_float64_where_a_parameter_is():
    parameters = [nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)), nn.Parameter(torch.zeros(2, 2))]
    assert Packer(parameters, ["a", "b"], None).wire_dtype == torch.float64
    assert Packer(parameters, ["a", "b"], "bfloat16").wire_dtype == torch.bfloat16
    with pytest.raises(ValueError, match="wire_dtype"):
        Packer(parameters, ["a", "b"], "int8")


def test_scales_of_each_strategy_by_hand():
    p, counts = np.array([0.5, 0.1, 1.0, 0.25]), np.array([2, 1, 4, 0])
    assert gradient_scales("independent", p, counts, 4).tolist() == [0.5, 2.5, 0.25, 0.0]
    assert gradient_scales("shared", p, counts, 4).tolist() == [0.5, 2.5, 0.25, 0.0]
    assert gradient_scales("stratified", p, counts, 4).tolist() == [0.5, 2.5, 0.25, 0.0]
    assert gradient_scales("stratified", np.array([0.6]), np.array([3]), 4).tolist() == [pytest.approx(1 / 3)]
