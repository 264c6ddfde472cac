"""Parameters -> layers."""

import numpy as np
import pytest
import torch
from torch import nn

from jointspar.step.layers import group_layers, named_groups


def make_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_a_module_s_tensors_form_one_layer_and_norms_are_always_active():
    layers = group_layers(make_network().named_parameters())
    assert [layer.name for layer in layers.sampled] == ["0", "3"]
    assert [layer.name for layer in layers.always_active] == ["1"]
    assert [layer.numel for layer in layers.sampled] == [4 * 9 + 4, 4 * 2 + 2]
    assert layers.layer_of.tolist() == [0, 0, -1, -1, 1, 1]


def test_grouping_by_tensor_makes_each_tensor_a_layer():
    layers = group_layers(make_network().named_parameters(), "tensor")
    assert layers.num_layers == 6 and not layers.always_active


def test_wrapper_prefixes_are_looked_through():
    names = ["module.fc.weight", "_orig_mod.module.net.module.conv.weight", "submodule.weight"]
    layers = group_layers([(name, torch.zeros(2, 2)) for name in names])
    assert [layer.name for layer in layers.sampled] == ["fc", "net.conv", "submodule"]


def test_weight_norm_belongs_to_its_module():
    module = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    layers = group_layers(module.named_parameters())
    assert [layer.name for layer in layers.sampled] == ["0"]
    assert len(layers.sampled[0].parameters) == 3


def test_parameter_lists_and_root_parameters_have_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Parameter(torch.zeros(1, 4))
            self.parts = nn.ParameterList([torch.zeros(2, 2), torch.zeros(3)])

    layers = group_layers(Model().named_parameters())
    assert [layer.name for layer in layers.sampled] == ["(root)", "parts"]


def test_tied_parameters_belong_to_their_first_name():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    pairs = list(nn.ModuleDict({"embed": embedding, "head": head}).named_parameters(remove_duplicate=False))
    assert len(pairs) == 2
    groups, named = named_groups(pairs)
    assert [name for name, _ in named] == ["embed.weight"]
    assert len(groups[0]["params"]) == 1


def test_equal_names_of_different_models_stay_apart():
    pairs = [*nn.Linear(2, 2).named_parameters("fc"), *nn.Linear(2, 2).named_parameters("fc")]
    layers = group_layers(pairs)
    assert [layer.name for layer in layers.sampled] == ["fc", "model2.fc"]
    assert len(set(layers.names)) == 4


def test_layers_span_parameter_groups():
    model = nn.Linear(3, 2)
    groups, named = named_groups(
        [{"params": [("fc.weight", model.weight)]}, {"params": [("fc.bias", model.bias)], "weight_decay": 0.0}]
    )
    assert len(groups) == 2
    assert [len(layer.parameters) for layer in group_layers(named).sampled] == [2]


def test_unnamed_parameters_are_layers_of_their_own():
    _, named = named_groups(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).parameters())
    layers = group_layers(named)
    assert layers.num_layers == 2 and len(layers.always_active) == 2


def test_sums_by_layer_leave_out_always_active_parameters():
    layers = group_layers(make_network().named_parameters())

    sums = layers.sum_by_layer(np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 1, 2, 5]))
    assert sums.tolist() == [3.0, 8.0]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no parameters"),
        ([("a", torch.zeros(3))], "one-dimensional"),
        ([("a", torch.zeros(2, 2, dtype=torch.int64))], "floating-point"),
        ([("a", torch.zeros(2, 2, dtype=torch.complex64))], "floating-point"),
        ([("a", torch.zeros(2, 2).expand(2, 2)[:, :1].expand(2, 3))], "gaps or overlaps"),
        ([("a", torch.zeros(4, 4)[:, ::2])], "gaps or overlaps"),
        ([("a", torch.zeros(2, 2, device="meta"))], "meta"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        group_layers(pairs)


def test_things_that_are_not_parameters_are_refused():
    with pytest.raises(TypeError, match="params"):
        group_layers([("a", 3.0)])
    with pytest.raises(TypeError, match="params"):
        named_groups(torch.zeros(3))
    with pytest.raises(ValueError, match="grouping"):
        group_layers(make_network().named_parameters(), "block")


def test_the_description_tells_memory_order_apart():
    dense = nn.Conv2d(3, 4, 3)
    other = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert group_layers(dense.named_parameters()).describe() != group_layers(other.named_parameters()).describe()


def test_a_layer_counts_where_any_of_its_parameters_does():
    layers = group_layers(make_network().named_parameters())
    flagged = [layers.with_any(np.arange(6) == position).tolist() for position in range(6)]
    assert flagged == [[True, False]] * 2 + [[False, False]] * 2 + [[False, True]] * 2
