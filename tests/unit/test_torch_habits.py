"""What users of PyTorch do beside plain training, and what an optimizer says where it cannot go along."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import jointspar as js
from jointspar.errors import JointSparError

ALL = js.Sampling(budget=1.0)
PLAIN = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}


def make_model(num_layers=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


def backward(model, scale=1.0):
    (scale * model(torch.ones(2, 4)).square().sum()).backward()


def make_scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def test_after_a_step_that_failed_a_scaler_does_not_scale_twice():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL, **PLAIN)
    scaler = make_scaler(1024.0)
    scaler.scale(torch.zeros(1))  # at first use it takes its scale up
    backward(model, 1024.0)
    wanted = [parameter - parameter.grad / 1024.0 for parameter in model.parameters()]
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = 1.0
    scaler.step(optimizer)
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value.detach())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
def test_scaled_gradients_that_were_exchanged_are_dropped_and_the_step_can_be_made_again(overlap, unscales):
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL, overlap=overlap, **PLAIN)
    scaler = make_scaler(8.0)
    scaler.scale(torch.zeros(1))
    backward(model, 8.0)
    wanted = [parameter - parameter.grad / 8.0 for parameter in model.parameters()]
    optimizer.synchronize()
    with pytest.raises(JointSparError, match="unscale_"):
        scaler.step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overlap: it is sent anew
        if unscales:
            scaler.unscale_(optimizer)
            optimizer.synchronize()
        scaler.step(optimizer)
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value.detach())


def test_of_two_optimizers_on_a_parameter_the_later_one_steps():
    model = make_model()
    first = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=0.5))
    second = js.JointSparSGD(model[:2].named_parameters(), sampling=js.Sampling(budget=0.5))
    backward(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    uses = (first.step, first.synchronize, lambda: first.load_state_dict(first.state_dict()),
            lambda: first.set_trainable([model[0].weight], False))  # fmt: skip
    for use in uses:
        with pytest.raises(JointSparError, match="another optimizer"):
            use()
    first.release()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    second.step()
    second.release()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_superseded_optimizer_that_is_to_load_a_state_stays_as_it_is():
    model = make_model()
    first = js.JointSparSGD(model.named_parameters(), lr=0.25, sampling=ALL)
    backward(model)
    first.step()
    state = first.state_dict()
    momenta = [first.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
    js.JointSparSGD(model.named_parameters(), sampling=ALL)
    state["param_groups"][0]["lr"] = 0.5
    state["state"] = {index: {"momentum_buffer": torch.zeros_like(momentum)} for index, momentum in enumerate(momenta)}
    with pytest.raises(JointSparError, match="another optimizer"):
        first.load_state_dict(state)
    assert first.param_groups[0]["lr"] == 0.25
    for parameter, momentum in zip(model.parameters(), momenta, strict=True):
        assert torch.equal(first.state[parameter]["momentum_buffer"], momentum)


def test_an_optimizer_that_could_not_be_built_takes_the_place_of_none():
    model = make_model()
    first = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        js.JointSparSGD(model[3].named_parameters())
    model.requires_grad_(True)
    first.set_trainable(model.parameters(), True)
    backward(model)
    first.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_training_goes_on_after_release(overlap):
    model, twin = make_model(), make_model()
    optimizer = js.JointSparSGD(
        model.named_parameters(), sampling=js.Sampling(budget=0.5), overlap=overlap, lr=0.01, momentum=0.0
    )
    other = js.JointSparSGD(twin.named_parameters(), sampling=js.Sampling(budget=0.5), lr=0.01, momentum=0.0)
    for step in range(6):
        for trained, its in ((model, optimizer), (twin, other)):
            its.zero_grad()
            if step == 2 and its is optimizer:
                its.release()
                assert all(parameter.requires_grad for parameter in trained.parameters())
            backward(trained)
            its.step()
    assert not all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_parameter_in_two_groups_is_refused():
    model = make_model()
    groups = [{"params": model.named_parameters()}, {"params": model[3].parameters(), "lr": 1e-3}]
    with pytest.raises(ValueError, match="groups 0 and 1"):
        js.JointSparSGD(groups)


def test_a_head_that_a_loss_left_out_once_is_not_relied_on_again():
    trunk, heads = nn.Linear(4, 4, bias=False), [nn.Linear(4, 1, bias=False) for _ in range(2)]
    model = nn.ModuleList([trunk, *heads])
    optimizer = js.JointSparSGD(
        model.named_parameters(), sampling=js.Sampling(budget=1, dense_steps=2, distribution="uniform")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a head without a gradient
        for step in range(40):  # two of all layers, then one layer a step: often a head that this loss leaves out
            optimizer.zero_grad()
            heads[step % 2](trunk(torch.ones(2, 4))).sum().backward()
            optimizer.step()


def test_a_state_that_was_cleared_is_saved_whole():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    backward(model)
    optimizer.step()
    before = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    optimizer.state.clear()
    state = optimizer.state_dict()
    assert before.abs().sum() > 0.0
    assert torch.equal(state["state"][0]["momentum_buffer"], before)
    optimizer.load_state_dict(state)


def test_freezing_what_was_exchanged_is_refused():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    backward(model)
    optimizer.synchronize()
    with pytest.raises(JointSparError, match="between"):
        optimizer.set_trainable([model[0].weight], False)
    optimizer.step()
    optimizer.set_trainable([model[0].weight], False)


def test_a_state_of_another_kind_of_optimizer_is_refused():
    lars = js.JointSparLARS(make_model().named_parameters(), lr=7.0)
    sgd = js.JointSparSGD(make_model().named_parameters())
    for optimizer, state in ((lars, sgd.state_dict()), (sgd, lars.state_dict())):
        rate = optimizer.param_groups[0]["lr"]
        with pytest.raises(ValueError, match="another optimizer"):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == rate


def test_made_up_names_do_not_meet_given_ones():
    tensors = [nn.Parameter(torch.full((2, 2), float(value))) for value in range(3)]
    optimizer = js.JointSparSGD(list(zip(["w", "w", "model2.w"], tensors, strict=True)), sampling=ALL)
    assert len({layer.name for layer in optimizer.layers}) == 3


@pytest.mark.parametrize("convert", ["double", "channels_last"])
def test_a_model_that_was_converted_is_refused_before_anything_happens(convert):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    optimizer = js.JointSparLARS(model.named_parameters())
    x = torch.ones(1, 3, 8, 8)
    if convert == "double":
        model, x = model.double(), x.double()
    else:
        model.to(memory_format=torch.channels_last)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(x).sum().backward()
    with pytest.raises(JointSparError, match=r"when the optimizer was built.*after model\.to"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_other_memory_of_the_same_kind_is_taken():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL, **PLAIN)
    backward(model)
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, -p.grad) for p in model.parameters())


def test_probabilities_are_those_of_active():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=0.5, dense_steps=1))
    assert optimizer.active.all() and optimizer.probabilities.tolist() == [1.0] * 4
    backward(model)
    optimizer.step()
    assert optimizer.probabilities.sum().item() == pytest.approx(2.0)
    assert optimizer.active.sum().item() == 2


def test_warnings_point_at_the_line_that_made_the_step():
    model = make_model()
    head = nn.Linear(4, 4)
    named = [*model.named_parameters(), *head.named_parameters("head")]
    optimizer = js.JointSparSGD(named, sampling=ALL)
    backward(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert {warning.filename for warning in caught} == {__file__}
    assert "got no gradient" in str(caught[0].message)


@pytest.mark.filterwarnings("ignore:overlap=True. what backward of step")
@pytest.mark.parametrize("overlap", [False, True])
def test_zero_grad_drops_what_was_exchanged(overlap):
    """As it drops gradients: synchronize(), a look, and a batch that is left out."""
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL, overlap=overlap, **PLAIN)
    backward(model, 5.0)
    optimizer.synchronize()
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        optimizer.synchronize()
    wanted = [parameter - parameter.grad for parameter in model.parameters()]
    optimizer.step()
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value.detach())


def test_a_train_step_that_is_compiled_whole_does_what_the_plain_one_does():
    weights = []
    for wrap in (lambda function: function, torch.compile(backend="eager")):
        model = make_model()
        optimizer = js.JointSparLARS(model.named_parameters(), lr=0.1)

        @wrap
        def train(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()

        for _ in range(8):
            train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize("by_checkpoint", [False, True])
def test_a_state_of_parameters_in_another_order_is_refused_and_one_of_other_names_loads(tmp_path, by_checkpoint):
    model = make_model()
    saved = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    backward(model)
    saved.step()
    js.checkpoint.save(tmp_path, model=model, optimizer=saved)
    named = list(model.named_parameters())
    other = js.JointSparSGD(named[2:] + named[:2], sampling=ALL)
    momenta = [other.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
    by_torch, by_js = lambda: other.load_state_dict(saved.state_dict()), js.checkpoint.load
    load = partial(by_js, tmp_path, model=model, optimizer=other) if by_checkpoint else by_torch
    with pytest.raises((ValueError, JointSparError), match=r"parameter 0 was '0.weight', which is parameter 6 here"):
        load()
    for parameter, momentum in zip(model.parameters(), momenta, strict=True):
        assert torch.equal(other.state[parameter]["momentum_buffer"], momentum)
    renamed = js.JointSparSGD([(f"new.{name}", parameter) for name, parameter in named], sampling=ALL)
    renamed.load_state_dict(saved.state_dict())
    assert "param_names" not in renamed.param_groups[0]
    for parameter in model.parameters():
        assert torch.equal(*(each.state[parameter]["momentum_buffer"] for each in (renamed, saved)))


def test_a_state_thaws_what_a_flag_froze_just_before():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL, **PLAIN)
    state = optimizer.state_dict()
    model[1].requires_grad_(False)
    optimizer.load_state_dict(state)
    before = model[1].weight.clone()
    backward(model)
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
