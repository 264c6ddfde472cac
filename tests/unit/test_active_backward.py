"""Only wanted parameters get gradients, and requires_grad is given back."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from jointspar.errors import JointSparError
from jointspar.step.active_backward import ActiveBackward


def make(num=3):
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(num)))
    return model, list(model.parameters())


def flags(parameters):
    return [parameter.requires_grad for parameter in parameters]


def learn(model, backward):
    """What a loss depends on."""
    backward.activate(np.ones(len(backward.trainable), dtype=bool))
    model(torch.randn(5, 2)).sum().backward()
    backward.observe()
    model.zero_grad()


def test_only_wanted_parameters_get_gradients_and_they_are_the_dense_ones():
    model, parameters = make()
    x = torch.randn(5, 2)
    model(x).square().sum().backward()
    dense = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad()
    backward = ActiveBackward(parameters)
    backward.activate(np.array([True, False, True]))
    model(x).square().sum().backward()
    assert parameters[1].grad is None
    assert torch.equal(parameters[0].grad, dense[0]) and torch.equal(parameters[2].grad, dense[2])


def test_with_nothing_wanted_backward_still_works():
    model, parameters = make()
    backward = ActiveBackward(parameters)
    backward.activate(np.zeros(3, dtype=bool))
    model(torch.randn(5, 2)).sum().backward()
    assert [parameter.grad is not None for parameter in parameters] == [True, False, True]
    backward.observe()
    model.zero_grad()
    backward.activate(np.zeros(3, dtype=bool))
    model(torch.randn(5, 2)).sum().backward()
    assert [parameter.grad is not None for parameter in parameters] == [False, False, True]


def test_parameters_frozen_at_construction_are_never_touched():
    _, parameters = make()
    parameters[1].requires_grad_(False)
    backward = ActiveBackward(parameters)
    backward.activate(np.ones(3, dtype=bool))
    assert flags(parameters) == [True, False, True]
    backward.release()
    assert flags(parameters) == [True, False, True]


def test_with_only_an_unused_head_wanted_backward_still_works():
    model, parameters = make()
    head = torch.nn.Parameter(torch.ones(2))  # the loss leaves it out
    backward = ActiveBackward([*parameters, head])
    backward.activate(np.ones(4, dtype=bool))
    model(torch.randn(5, 2)).sum().backward()
    backward.observe()
    model.zero_grad()
    backward.activate(np.array([False, False, False, True]))
    model(torch.randn(5, 2)).sum().backward()
    assert [parameter.grad is not None for parameter in parameters] == [False, False, True]


def test_release_gives_requires_grad_back():
    _, parameters = make()
    backward = ActiveBackward(parameters)
    backward.activate(np.array([True, False, False]))
    backward.release()
    assert flags(parameters) == [True, True, True]


def test_freezing_and_thawing_by_the_user_is_honoured():
    model, parameters = make()
    parameters[2].requires_grad_(False)
    backward = ActiveBackward(parameters)
    learn(model, backward)
    backward.activate(np.array([True, False, True]))
    parameters[0].requires_grad_(False)
    parameters[2].requires_grad_(True)
    with pytest.warns(UserWarning, match="cleared"):  # parameter 1 is inactive
        backward.observe()
    assert backward.trainable.tolist() == [False, True, True]
    backward.activate(np.ones(3, dtype=bool))
    assert flags(parameters) == [False, True, True]


def test_freezing_by_flag_warns_once_where_inactive_layers_would_be_missed():
    model, parameters = make()
    backward = ActiveBackward(parameters)
    learn(model, backward)
    parameters[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward.observe()  # all are active, so all that was meant is seen
    backward.activate(np.array([False, True, False]))
    parameters[1].requires_grad_(False)  # and 2, whose flag is off already
    with pytest.warns(UserWarning, match="inactive in this step.*go on training.*set_trainable"):
        backward.release()
    assert backward.trainable.tolist() == [False, False, True]
    backward.set_trainable([1], True)
    backward.activate(np.array([False, True, False]))
    parameters[1].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward.observe()


def test_freezing_in_both_ways_at_once_is_no_reason_to_warn():
    _, parameters = make()
    backward = ActiveBackward(parameters)
    backward.activate(np.array([True, False, True]))
    backward.set_trainable([0, 1], False)
    parameters[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward.observe()


def test_a_new_owner_of_the_active_parameters_alone_is_warned_of():
    _, parameters = make()
    before = ActiveBackward(parameters)
    before.activate(np.array([True, False, True]))
    with pytest.warns(UserWarning, match=r"will not train: call its release\(\)"):
        after = ActiveBackward([parameter for parameter in parameters if parameter.requires_grad])
    assert flags(parameters) == [True, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.activate(np.array([True, False]))
        ActiveBackward(parameters[2:])  # what is active is left out too, so it was meant
        ActiveBackward(parameters)


def test_set_trainable_freezes_inactive_parameters_too():
    _, parameters = make()
    backward = ActiveBackward(parameters)
    backward.activate(np.array([True, False, False]))
    backward.set_trainable([1], False)
    backward.activate(np.ones(3, dtype=bool))
    assert flags(parameters) == [True, False, True]


def test_nothing_to_train_is_an_error():
    _, parameters = make()
    for parameter in parameters:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        ActiveBackward(parameters)


def test_with_nothing_wanted_a_parameter_that_the_loss_depends_on_stays():
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    parameters = [*used.parameters(), *unused.parameters()]
    backward = ActiveBackward(parameters)
    used(torch.randn(3, 2)).sum().backward()
    backward.observe()
    backward.activate(np.zeros(4, dtype=bool))
    used(torch.randn(3, 2)).sum().backward()
    assert flags(parameters) == [False, True, False, False]


def test_another_owner_of_the_same_parameters_starts_from_the_user_s_flags():
    _, parameters = make()
    first = ActiveBackward(parameters)
    first.activate(np.array([True, False, False]))
    second = ActiveBackward(parameters)
    assert second.trainable.tolist() == [True] * 3
    second.activate(np.array([True, False, True]))
    del first
    assert flags(parameters) == [True, False, True]
    del second
    assert flags(parameters) == [True] * 3


def test_reentrant_checkpointing_is_refused_and_the_other_kind_works():
    for use_reentrant in (False, True):
        model, parameters = make()
        backward = ActiveBackward(parameters)
        backward.activate(np.array([True, False, True]))
        hidden = model[0](torch.randn(5, 2))
        loss = torch.utils.checkpoint.checkpoint(model[1:], hidden, use_reentrant=use_reentrant).sum()
        if use_reentrant:
            with pytest.raises(JointSparError, match="use_reentrant=False"):
                loss.backward()
        else:
            loss.backward()
            assert [parameter.grad is not None for parameter in parameters] == [True, False, True]


def test_a_step_without_backward_says_nothing_about_what_a_loss_depends_on():
    model, parameters = make()
    backward = ActiveBackward(parameters)
    learn(model, backward)
    for wanted in ([True, True, True], [True, False, False]):
        backward.activate(np.array(wanted))
        backward.observe()  # nobody called backward
    backward.activate(np.array([True, False, False]))
    assert flags(parameters) == [True, False, False]  # no other was needed
    backward.release()
    model(torch.randn(5, 2)).sum().backward()
    backward.observe()
    backward.activate(np.array([False, True, False]))
    assert flags(parameters) == [False, True, False]


def test_layers_given_back_after_backward_count_as_what_could_have_no_gradient():
    model, parameters = make()
    backward = ActiveBackward(parameters)
    backward.activate(np.array([True, False, False]))
    model(torch.randn(5, 2)).sum().backward()
    backward.release()  # all flags are on again, as if the others could have had one
    backward.observe()
    backward.activate(np.array([True, True, False]))
    model(torch.randn(5, 2)).sum().backward()
    backward.observe()
    backward.activate(np.array([False, True, False]))
    assert flags(parameters) == [False, True, False]  # it is not taken for a head that losses leave out


class WithUnused(nn.Module):
    """Layers of which the loss depends on all but one."""

    def __init__(self, unused):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.unused = unused

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = x if index == self.unused else layer(x)
        return x


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_a_layer_that_no_loss_depends_on_may_be_the_only_one_wanted_at_any_time(unused):
    only = np.arange(3) == unused
    for wanted_before in ([], [~only], [only, ~only], [np.array([True, False, False])]):
        model = WithUnused(unused)
        backward = ActiveBackward(list(model.parameters()))
        for wanted in (*wanted_before, only, only):
            backward.activate(wanted)
            model.zero_grad()
            model(torch.randn(5, 2)).sum().backward()
            backward.observe()


def test_before_anything_is_known_the_first_and_the_last_stay_differentiable_and_later_none():
    model, parameters = make()
    backward = ActiveBackward(parameters)
    for expected in ([True, True, True], [False, True, False]):
        backward.activate(np.array([False, True, False]))
        assert flags(parameters) == expected
        model(torch.randn(5, 2)).sum().backward()
        backward.observe()
