"""The optimizers in one process: against plain PyTorch loops, and what users of torch.optim expect."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jointspar.errors import JointSparError

ALL = js.Sampling(budget=1.0)


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 16), nn.Tanh(), nn.Linear(16, 3),
    )  # fmt: skip
    return model.to(dtype)


def batches(count, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(0, 3, (8,), generator=generator)


def backward(model, batch):
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def weights(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def train(model, optimizer, count, dtype=torch.float32, seed=1):
    for batch in batches(count, dtype, seed):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


def plain_lars_step(parameters, momenta, *, lr, momentum, weight_decay, trust, eps, nesterov=False):
    """LARS as the paper writes it, in unfused PyTorch."""
    for parameter, velocity in zip(parameters, momenta, strict=True):
        grad, decay, local = parameter.grad, weight_decay, 1.0
        if parameter.ndim <= 1:
            decay = 0.0
        else:
            weight_norm, grad_norm = parameter.norm(), grad.norm()
            if weight_norm > 0 and grad_norm > 0:
                local = trust * weight_norm / (grad_norm + weight_decay * weight_norm + eps)
        update = local * (grad + decay * parameter)
        velocity.mul_(momentum).add_(update)
        parameter.sub_(lr * (update + momentum * velocity if nesterov else velocity))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_everything_active_is_lars_over_200_steps(dtype, tolerance, nesterov):
    model, twin = make_model(dtype), make_model(dtype)
    optimizer = js.JointSparLARS(
        model.named_parameters(), lr=0.5, trust_coefficient=0.02, weight_decay=1e-3, nesterov=nesterov, sampling=ALL
    )
    momenta = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    for batch in batches(200, dtype):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        twin.zero_grad()
        backward(twin, batch)
        with torch.no_grad():
            plain_lars_step(
                list(twin.parameters()), momenta, lr=0.5, momentum=0.9, weight_decay=1e-3, trust=0.02, eps=1e-8,
                nesterov=nesterov,
            )  # fmt: skip
    assert (weights(model) - weights(twin)).norm() <= tolerance * weights(twin).norm()


def test_everything_active_is_bit_equal_to_the_fused_operation():
    model, twin = make_model(), make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), lr=0.5, trust_coefficient=0.02, sampling=ALL)
    parameters = list(twin.parameters())
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    norms = None
    for batch in batches(50):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        twin.zero_grad()
        backward(twin, batch)
        norms = js.ops.lars_update(
            parameters, momenta, [parameter.grad for parameter in parameters], lr=0.5, momentum=0.9,
            weight_decay=[1e-4 if parameter.ndim > 1 else 0.0 for parameter in parameters], trust_coefficient=0.02,
            eps=1e-8, param_norms=None if norms is None else norms.param_norms_after,
        )  # fmt: skip
        assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("nesterov", [False, True])
def test_everything_active_is_torch_sgd(nesterov):
    model, twin = make_model(torch.float64), make_model(torch.float64)
    settings = dict(lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL, **settings)
    reference = torch.optim.SGD(twin.parameters(), **settings)
    train(model, optimizer, 100, torch.float64)
    train(twin, reference, 100, torch.float64)
    assert (weights(model) - weights(twin)).norm() <= 1e-10 * weights(twin).norm()


COMBINATIONS = [
    (strategy, draw, distribution, lag)
    for strategy, draw, distribution, lag in itertools.product(
        ("independent", "stratified", "shared"), ("systematic", "bernoulli"), ("bandit", "norm", "uniform"), (0, 1)
    )
    if distribution != "uniform" or lag == 0
]


@pytest.mark.parametrize(("strategy", "draw", "distribution", "lag"), COMBINATIONS)
def test_every_combination_learns_and_keeps_the_sum_of_probabilities(strategy, draw, distribution, lag):
    p_min = None if distribution == "uniform" else 0.1
    sampling = js.Sampling(0.5, p_min, strategy=strategy, draw=draw, distribution=distribution, lag=lag)
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.05, weight_decay=0.0, sampling=sampling)
    batch = next(batches(1))
    first = backward(model, batch).item()
    for _ in range(60):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        probabilities = optimizer.probabilities
        assert abs(probabilities.sum().item() - 2.0) < 1e-9
        assert probabilities.min() >= 0.1 - 1e-12 and probabilities.max() <= 1.0
        if draw == "systematic":
            assert optimizer.active.sum() == 2
    optimizer.zero_grad()
    assert backward(model, batch).item() < 0.5 * first


def test_the_paper_s_literal_choices_train():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.05, weight_decay=0.0, sampling=js.Sampling.paper(0.5))
    assert len(optimizer.layers) == len(list(model.parameters()))
    train(model, optimizer, 60)
    assert abs(optimizer.probabilities.sum().item() - 5.0) < 1e-9
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("strategy", ["independent", "stratified", "shared"])
def test_dense_steps_are_those_of_the_dense_optimizer_and_teach_all_norms(strategy):
    models, optimizers = [], []
    for sampling in (js.Sampling(budget=1.0), js.Sampling(budget=0.5, strategy=strategy, dense_steps=3)):
        models.append(make_model())
        optimizers.append(js.JointSparLARS(models[-1].named_parameters(), lr=0.05, sampling=sampling))
        train(models[-1], optimizers[-1], 3)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert optimizers[1].active.sum() == 2
    assert abs(optimizers[1].probabilities.sum().item() - 2.0) < 1e-9
    assert (optimizers[1].state_dict()["jointspar"]["distribution"]["norm_count"] == 3).all()


def test_only_active_layers_get_gradients_and_updates():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=2))
    backward(model, *batches(1))  # tells what a loss depends on; the first and the last parameter get gradients besides
    optimizer.step()
    for batch in batches(20):
        active = optimizer.active
        before = [parameter.detach().clone() for parameter in model.parameters()]
        momenta = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        parameters = list(model.parameters())
        for layer, is_active in zip(optimizer.layers, active.tolist(), strict=True):
            for index in layer.parameters:
                assert (parameters[index].grad is not None) == is_active
                if not is_active:
                    assert torch.equal(parameters[index], before[index])
                    assert torch.equal(optimizer.state[parameters[index]]["momentum_buffer"], momenta[index])
                elif parameters[index].ndim > 1:
                    assert not torch.equal(parameters[index], before[index])
        assert not torch.equal(parameters[2], before[2])  # batch norm is always active


def test_inactive_decay_lets_momentum_and_weight_decay_act():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    optimizer = js.JointSparLARS(
        model.named_parameters(),
        lr=0.1,
        momentum=0.5,
        weight_decay=0.01,
        inactive="decay",
        sampling=js.Sampling(budget=1),
    )
    idle = int(np.flatnonzero(~optimizer.active.numpy())[0])
    parameter = list(model.parameters())[idle]
    optimizer.state[parameter]["momentum_buffer"].fill_(0.2)
    expected = parameter.detach() - 0.1 * (0.5 * 0.2 + 0.01 * parameter.detach())
    model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


def test_the_gradient_of_an_active_layer_is_the_dense_one_over_p():
    model = make_model(torch.float64)
    twin = copy.deepcopy(model)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=2, strategy="independent"))
    batch = next(batches(1, torch.float64))
    backward(twin, batch)
    dense = dict(twin.named_parameters())
    backward(model, batch)
    optimizer.synchronize()
    assert len(optimizer.mean_grads) == 2 * 2 + 2
    for name, mean_grad in optimizer.mean_grads.items():
        factor = 1.0 if name.startswith("1.") else 1.0 / optimizer.probabilities[0].item()
        torch.testing.assert_close(mean_grad, dense[name].grad * factor, rtol=1e-12, atol=1e-15)


def test_mean_grads_may_be_changed_before_the_step():
    model, twin = make_model(), make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=ALL)
    backward(model, next(batches(1)))
    optimizer.synchronize()
    with pytest.raises(JointSparError, match="twice"):
        optimizer.synchronize()
    with pytest.raises(ValueError, match="synchronize"):
        optimizer.step(max_norm=1.0)
    for mean_grad in optimizer.mean_grads.values():
        mean_grad.zero_()
    optimizer.step()
    with pytest.raises(JointSparError, match="mean_grads"):
        _ = optimizer.mean_grads
    # LARS with zero gradient: local is 1, so matrices shrink by lr * weight_decay and vectors stay
    for parameter, original in zip(model.parameters(), twin.parameters(), strict=True):
        factor = 1 - 0.1 * 1e-4 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter, original * factor)


@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
@pytest.mark.parametrize("distribution", ["norm", "bandit"])
def test_state_dict_round_trip_continues_bit_for_bit(kind, distribution):
    sampling = js.Sampling(budget=0.5, p_min=0.1, distribution=distribution, lag=1)
    model = make_model()
    optimizer = kind(model.named_parameters(), sampling=sampling)
    train(model, optimizer, 7)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    other = kind(copied.named_parameters(), lr=7.0, sampling=sampling)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.active, optimizer.active)
    train(model, optimizer, 7, seed=5)
    train(copied, other, 7, seed=5)
    assert torch.equal(weights(model), weights(copied))
    assert torch.equal(optimizer.probabilities, other.probabilities)


def test_a_state_of_another_optimizer_is_refused_and_changes_nothing():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="jointspar"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    small = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameters"):
        optimizer.load_state_dict(js.JointSparLARS(small.named_parameters()).state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["state"].clear(),
        lambda state: state["state"][0].update(momentum_buffer=torch.zeros(1)),
        lambda state: state["param_groups"][0].pop("trust_coefficient"),
        lambda state: state["param_groups"][0].update(lr=-1.0),
        lambda state: state["param_groups"].append(dict(state["param_groups"][0])),
        lambda state: state["jointspar"]["update"].pop("norms"),
        lambda state: state["jointspar"]["update"].pop("steps"),
        lambda state: state["jointspar"]["update"].update(norms=[1.0]),
        lambda state: state["jointspar"]["update"].update(norms=state["jointspar"]["update"]["norms"].to_sparse()),
        lambda state: state["jointspar"]["update"].update(steps=torch.tensor(-1)),
    ],
)
def test_a_spoilt_state_is_refused_and_changes_nothing(spoil):
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    before = str(state)
    spoil(state)
    with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before
    train(model, optimizer, 1)


def test_a_loaded_state_keeps_to_the_budget_of_this_optimizer():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1))
    train(model, optimizer, 5)
    other = js.JointSparLARS(make_model().named_parameters(), sampling=js.Sampling(budget=3))
    other.load_state_dict(optimizer.state_dict())
    assert other.probabilities.sum().item() == pytest.approx(3.0, abs=1e-9)


def test_building_an_optimizer_again_starts_from_all_parameters():
    model = make_model()
    first = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1))
    train(model, first, 2)
    second = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1.0))
    assert second.probabilities.tolist() == [1.0] * 4
    train(model, second, 2)


def test_a_bad_learning_rate_is_refused_before_anything_happens():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    backward(model, next(batches(1)))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()


def test_what_is_refused_between_synchronize_and_step():
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters())
    backward(model, next(batches(1)))
    optimizer.synchronize()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)
    with pytest.raises(JointSparError, match="between"):
        js.checkpoint.save("unused", model=model, optimizer=optimizer)


def test_lr_schedulers_and_parameter_groups_act():
    model = make_model()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim > 1], "lr": 0.5},
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim <= 1], "lr": 0.0},
    ]
    optimizer = js.JointSparSGD(groups, sampling=ALL)
    assert len(optimizer.layers) == 4
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    vectors = [parameter.detach().clone() for parameter in model.parameters() if parameter.ndim <= 1]
    matrices = [parameter.detach().clone() for parameter in model.parameters() if parameter.ndim > 1]
    train(model, optimizer, 1)
    scheduler.step()
    after_first = weights(model)
    assert all(torch.equal(a, b) for a, b in zip(vectors, [p for p in model.parameters() if p.ndim <= 1], strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(matrices, [p for p in model.parameters() if p.ndim > 1], strict=True)
    )
    train(model, optimizer, 1)
    assert torch.equal(after_first, weights(model))


def test_closures_are_evaluated_once_and_their_loss_is_returned():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    batch, calls = next(batches(1)), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        return backward(model, batch)

    loss = optimizer.step(closure)
    assert calls == [True] and loss.item() > 0


def test_gradient_accumulation_keeps_one_active_set():
    model = make_model(torch.float64)
    twin = copy.deepcopy(model)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=2))
    active = optimizer.active
    pair = list(batches(2, torch.float64))
    for batch in pair:
        backward(model, batch)
        backward(twin, batch)
        assert torch.equal(optimizer.active, active)
    for ours, dense in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is not None) == ours.requires_grad
        assert ours.grad is None or torch.equal(ours.grad, dense.grad)
    optimizer.step()


def test_grads_stay_as_backward_left_them():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    backward(model, next(batches(1)))
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step(max_norm=0.1)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None and grad is None) or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("split", [False, True])
def test_max_norm_clips_the_mean_gradient(split):
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.1, momentum=0.0, weight_decay=0.0, sampling=ALL)
    backward(model, next(batches(1, torch.float64)))
    backward(twin, next(batches(1, torch.float64)))
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    if split:
        optimizer.synchronize(max_norm=0.01)
        optimizer.step()
    else:
        optimizer.step(max_norm=0.01)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.sub_(0.1 * parameter.grad)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.step(max_norm=0.0)


def test_clip_grad_norm_clips_the_local_gradient():
    model = make_model(torch.float64)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    backward(model, next(batches(1, torch.float64)))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.synchronize()
    total = sum(grad.square().sum() for grad in optimizer.mean_grads.values()).sqrt()
    assert total.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("distribution", ["norm", "bandit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_with_a_non_finite_gradient_is_skipped_whole(value, distribution):
    model = make_model()
    sampling = js.Sampling(distribution=distribution, p_min=0.1)
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling)
    train(model, optimizer, 3)
    before, state = weights(model).clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, next(batches(1)))
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
    optimizer.step()
    assert torch.equal(weights(model), before)
    after = optimizer.state_dict()
    for index, entry in state["state"].items():
        assert torch.equal(entry["momentum_buffer"], after["state"][index]["momentum_buffer"])
    assert str(after["jointspar"]["distribution"]) == str(state["jointspar"]["distribution"])
    assert after["jointspar"]["step"] == state["jointspar"]["step"] + 1
    assert optimizer.stats.skipped_steps == 1


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("kind", [js.JointSparLARS, js.JointSparSGD])
@pytest.mark.parametrize("values", [("nan", "inf"), ("inf", "nan"), ("inf", "1"), ("nan", "1")])
def test_a_clipped_step_with_a_non_finite_gradient_is_skipped_whole(kind, lag, values):
    model = make_model()
    optimizer = kind(model.named_parameters(), sampling=js.Sampling(budget=1.0, lag=lag))
    train(model, optimizer, 3)
    before = weights(model).clone()
    optimizer.zero_grad()
    backward(model, next(batches(1)))
    for parameter, value in zip((model[0].weight, model[6].weight), values, strict=True):
        parameter.grad.view(-1)[0] = float(value)
    optimizer.step(max_norm=0.1)
    assert torch.equal(weights(model), before)
    train(model, optimizer, 1)
    assert optimizer.stats.skipped_steps == 1 and not torch.equal(weights(model), before)


def test_fifty_skipped_steps_in_a_row_are_an_error():
    model = nn.Linear(2, 2)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    model.weight.grad, model.bias.grad = torch.full((2, 2), float("nan")), torch.zeros(2)
    for _ in range(49):
        optimizer.step()
    with pytest.raises(JointSparError, match="50 steps in a row"):
        optimizer.step()


def test_grad_scaler_gives_the_unscaled_step_and_skips_overflow():
    model, twin = make_model(torch.float64), make_model(torch.float64)
    sampling = js.Sampling(budget=2, p_min=0.1)
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling)
    plain = js.JointSparLARS(twin.named_parameters(), sampling=sampling)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, batch in enumerate(batches(6, torch.float64)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(twin, plain, 6, torch.float64)
    assert (weights(model) - weights(twin)).norm() <= 1e-12 * weights(twin).norm()
    torch.testing.assert_close(optimizer.probabilities, plain.probabilities, rtol=1e-12, atol=0)
    before = weights(model).clone()
    optimizer.zero_grad()
    scaler.scale(nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights(model), before) and optimizer.stats.skipped_steps == 1
    assert scaler.get_scale() == 512.0


def test_empty_active_sets_train_on():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    sampling = js.Sampling(budget=0.25, draw="bernoulli", distribution="uniform")
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=sampling)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    sizes = set()
    for _ in range(40):
        sizes.add(int(optimizer.active.sum()))
        before = weights(model).clone()
        empty = not optimizer.active.any()
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weights(model)) == empty
    assert 0 in sizes


def test_parameters_unused_in_a_forward_count_as_zero_and_warn_once():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    optimizer = js.JointSparSGD(model.named_parameters(), weight_decay=0.0, sampling=ALL)
    before = model["unused"].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model["used"](torch.randn(3, 2)).sum().backward()
            optimizer.step()
    assert sum("got no gradient" in str(warning.message) for warning in caught) == 2  # weight and bias, once each
    assert torch.equal(model["unused"].weight, before)


def test_user_frozen_parameters_stay_frozen_and_release_gives_back():
    model = make_model()
    model[3].requires_grad_(False)
    before = model[3].weight.detach().clone()
    optimizer = js.JointSparLARS(model.named_parameters(), inactive="decay", sampling=js.Sampling(budget=0.5))
    frozen = [layer.name for layer in optimizer.layers].index("3")
    for batch in batches(10):
        assert not optimizer.active[frozen] and optimizer.probabilities[frozen] == 0.0
        assert abs(optimizer.probabilities.sum().item() - 1.5) < 1e-9
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert torch.equal(model[3].weight, before)
    optimizer.release()
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2 + [True] * 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("thaws", [False, True])
def test_a_state_saved_after_freezing_or_thawing_continues_bit_for_bit(seed, lag, thaws):
    """As at the end of an epoch: the step that was drawn before is made with the layers of then."""
    sampling = js.Sampling(budget=2, p_min=0.1, seed=seed, lag=lag)
    model = make_model()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=sampling)
    if thaws:
        optimizer.set_trainable(model[3].parameters(), False)
    train(model, optimizer, 3)
    optimizer.set_trainable(model[3].parameters(), thaws)
    copied = make_model(seed=1)
    other = js.JointSparSGD(copied.named_parameters(), sampling=sampling)
    copied.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.active, optimizer.active) and torch.equal(other.probabilities, optimizer.probabilities)
    for count in (1, 1, 5):
        for each, its_optimizer in ((model, optimizer), (copied, other)):
            train(each, its_optimizer, count, seed=5)
        assert torch.equal(weights(copied), weights(model))


def test_the_expected_step_of_sgd_is_the_dense_one_where_inactive_layers_decay():
    """Two weights of which each step computes one: w = 1, u = 1, g = 0.2, decay 0.1, momentum 0.9, rate 1; by hand."""
    expected = {"decay": 0.9 + 0.1 + 0.2, "skip": 0.5 * (0.9 + 0.1) + 0.2}
    for inactive, step in expected.items():
        steps = []
        for seed in range(400):
            model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(2)).double()
            for parameter in model.parameters():
                nn.init.ones_(parameter)
            settings = dict(lr=1.0, momentum=0.9, weight_decay=0.1, inactive=inactive)
            sampling = js.Sampling(budget=1, seed=seed)
            optimizer = js.JointSparSGD(model.named_parameters(), **settings, sampling=sampling)
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"].fill_(1.0)
            (0.2 * sum(linear(torch.ones(1, 1, dtype=torch.float64)).sum() for linear in model)).backward()
            optimizer.step()
            steps.append([1.0 - parameter.item() for parameter in model.parameters()])
        assert np.mean(steps) == pytest.approx(step, abs=1e-9)  # one is active, whichever: the mean of both is exact


def test_freezing_and_thawing_in_mid_training_is_honoured():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=0.5))
    train(model, optimizer, 5)
    optimizer.set_trainable(model[6].parameters(), False)
    frozen = model[6].weight.detach().clone()
    train(model, optimizer, 10)
    assert torch.equal(model[6].weight, frozen)
    assert optimizer.probabilities[2] == 0.0 and abs(optimizer.probabilities.sum().item() - 1.5) < 1e-9
    model[6].requires_grad_(True)
    train(model, optimizer, 20)
    assert not torch.equal(model[6].weight, frozen)
    assert abs(optimizer.probabilities.sum().item() - 2.0) < 1e-9
    with pytest.raises(ValueError, match="parameters"):
        optimizer.set_trainable([torch.zeros(2)], True)


def test_flags_that_are_set_on_inactive_layers_warn_once():
    """As a GAN does it: its discriminator frozen for the generator's turn, and thawed for its own."""
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1))

    def take_turns():
        for batch in batches(4):
            model.requires_grad_(False)
            model.requires_grad_(True)
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()

    with pytest.warns(UserWarning, match="inactive in this step.*set_trainable") as caught:
        take_turns()
    assert len(caught) == 1 and caught[0].filename == __file__
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.release()


def test_a_layer_frozen_in_mid_step_teaches_nothing():
    """It is packed no more, so that what is known of its gradient is not a norm of 0."""
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=1.0))
    train(model, optimizer, 3)
    optimizer.zero_grad()
    backward(model, next(batches(1)))
    known = optimizer.state_dict()["jointspar"]["distribution"]["norm_ema"][1].clone()
    optimizer.set_trainable(model[3].parameters(), False)
    optimizer.step()
    assert optimizer.state_dict()["jointspar"]["distribution"]["norm_ema"][1] == known > 0.0


def test_parameters_that_share_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' share memory"):
        js.JointSparLARS(model.named_parameters())
    flat = torch.zeros(20)
    js.JointSparLARS([nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:].view(2, 4)), nn.Parameter(flat[:0])])


def test_copies_are_refused():
    optimizer = js.JointSparLARS(make_model().named_parameters())
    for copy_of in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copy_of(optimizer)


def test_parameter_groups_stay_as_they_were_given():
    """Also empty ones, since schedulers take a rate for each."""
    model = make_model()
    groups = [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": []}]
    groups.append({"params": list(model[6].parameters())})
    optimizer = js.JointSparLARS(groups, lr=0.3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 2]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 2.0, lambda _: 3.0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.6, 0.9])
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.6, 0.9])


def test_a_replaced_list_of_parameter_groups_counts():
    """torch's own optimizers read `self.param_groups`, which some wrappers assign."""
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), lr=0.3, momentum=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.param_groups = [dict(group, lr=0.0) for group in optimizer.param_groups]
    train(model, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.param_groups = [dict(optimizer.param_groups[0], params=list(model[0].parameters()))]
    with pytest.raises(ValueError, match="param_groups: were replaced by groups of other parameters"):
        optimizer.step()


def test_compiled_blocks_train_as_plain_ones():
    """Each is compiled once for each set of its layers that is active."""
    models = [nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    torch._dynamo.reset()
    for block in models[1]:
        block.forward = torch.compile(block.forward, backend="eager")
    optimizers = [js.JointSparLARS(model.named_parameters(), lr=0.1) for model in models]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(12):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(step)
                model(torch.randn(4, 6, generator=generator)).square().mean().backward()
                optimizer.step()
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_tied_weights_are_one_layer_and_train():
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4), head)
    optimizer = js.JointSparLARS(model.named_parameters(remove_duplicate=False), sampling=ALL)
    assert len(optimizer.layers) == 2
    before = head.weight.detach().clone()
    model(torch.tensor([1, 2, 3])).square().sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_bfloat16_models_keep_float32_momentum():
    model = make_model(torch.bfloat16)
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=js.Sampling(budget=0.5))
    train(model, optimizer, 5, torch.bfloat16)
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    assert all(momentum.dtype == torch.float32 for momentum in momenta)
    other = js.JointSparLARS(make_model(torch.bfloat16).named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert all(
        torch.equal(other.state[p]["momentum_buffer"], m)
        for p, m in zip(other.param_groups[0]["params"], momenta, strict=True)
    )


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_gradients_of_1x1_kernels_are_packed_as_they_lie_whatever_their_strides_of_size_1_are(backend):
    """A contiguous model that is fed channels_last images gets such gradients: another order in name only."""
    parameters = [nn.Parameter(torch.randn(5, 3, 1, 1)), nn.Parameter(torch.randn(4, 3))]
    optimizer = js.JointSparSGD(parameters, lr=1.0, momentum=0.0, weight_decay=0.0, sampling=ALL)
    before = parameters[0].detach().clone()
    grad = torch.randn(5, 3, 1, 1).to(memory_format=torch.channels_last)
    assert grad.stride() != parameters[0].stride()
    parameters[0].grad, parameters[1].grad = grad, torch.zeros(4, 3)
    assert optimizer._pipeline.packer._checked_grad(0) is grad
    with js.ops.use_backend(backend):
        optimizer.step()
    torch.testing.assert_close(parameters[0], before - grad)


def test_channels_last_models_train_as_contiguous_ones():
    model, twin = make_model(torch.float64), make_model(torch.float64).to(memory_format=torch.channels_last)
    settings = dict(lr=0.5, trust_coefficient=0.02, sampling=js.Sampling(budget=2))
    train(model, js.JointSparLARS(model.named_parameters(), **settings), 10, torch.float64)
    train(twin, js.JointSparLARS(twin.named_parameters(), **settings), 10, torch.float64)
    assert (weights(model) - weights(twin)).norm() <= 1e-10 * weights(model).norm()


def test_norms_are_measured_again_when_somebody_else_writes_the_weights():
    model, twin = make_model(torch.float64), make_model(torch.float64)
    settings = dict(lr=0.5, trust_coefficient=0.02, sampling=ALL)
    optimizer, other = (js.JointSparLARS(m.named_parameters(), **settings) for m in (model, twin))
    train(model, optimizer, 1, torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    train(model, optimizer, 1, torch.float64)
    train(twin, other, 1, torch.float64)
    with torch.no_grad():
        twin[0].weight.mul_(3.0)
    state = other.state_dict()
    state["jointspar"]["update"].clear()  # nothing is carried then
    fresh = js.JointSparLARS(twin.named_parameters(), **settings)
    fresh.load_state_dict(state)
    train(twin, fresh, 1, torch.float64)
    assert (weights(model) - weights(twin)).norm() <= 1e-12 * weights(model).norm()


def test_versions_are_counted_where_torch_refuses_inference_tensors(monkeypatch):
    """As torch before 2.13 does."""
    with torch.inference_mode():
        inference = torch.ones(3)
    ordinary, count = torch.ones(3), torch.autograd.graph.increment_version

    def refusing(tensors):
        if any(tensor.is_inference() for tensor in tensors):
            raise RuntimeError("Inference tensors do not track version counter.")
        count(tensors)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", refusing)
    version = ordinary._version
    js.ops.unpack_gradients(torch.zeros(6), [inference, ordinary])
    assert ordinary._version > version


def test_writing_parameters_bumps_their_version_as_torch_does():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters(), sampling=ALL)
    loss = backward(model, next(batches(1)))
    version = model[0].weight._version
    optimizer.step()
    assert model[0].weight._version > version and torch.isfinite(loss)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(lr=-1.0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(momentum=-0.1), "momentum"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(nesterov=True, momentum=0.0), "nesterov"),
        (dict(trust_coefficient=-1.0), "trust_coefficient"),
        (dict(eps=float("inf")), "eps"),
        (dict(inactive="drop"), "inactive"),
        (dict(wire_dtype="int8"), "wire_dtype"),
        (dict(exchange="mail"), "exchange"),
        (dict(sampling=js.Sampling(budget=100)), "budget"),
    ],
)
def test_settings_that_no_step_could_use_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        js.JointSparLARS(make_model().named_parameters(), **settings)


def test_skipped_weight_gradient_flops_are_counted():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=1))
    assert optimizer.stats.weight_grad_flops_skipped is None
    optimizer.count_flops(model, torch.randn(8, 1, 8, 8))
    by_hand = [2 * 8 * 36 * 4 * 9, 2 * 8 * 4 * 36 * 5]
    total = 0
    for batch in batches(6):
        idle = int(np.flatnonzero(~optimizer.active.numpy())[0])
        total += by_hand[idle]
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        assert optimizer.stats.weight_grad_flops_skipped == by_hand[idle]
    assert optimizer.stats.total_weight_grad_flops_skipped == total


@pytest.mark.parametrize("exchange", ["allreduce", "ring", "two_shot"])
def test_all_that_is_sent_is_counted(exchange):
    def run(_):
        model = make_model()
        optimizer = js.JointSparLARS(model.named_parameters(), exchange=exchange, check_every=2)
        before = optimizer.comm.bytes_sent
        for batch in batches(4):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.synchronize()
            optimizer.step()
        return optimizer.stats.total_sent_bytes, optimizer.comm.bytes_sent - before

    for counted, sent in js.comm.run_simulated(3, run):
        assert counted == sent > 0


def test_parameters_cannot_be_added_later():
    optimizer = js.JointSparLARS(make_model().named_parameters())
    with pytest.raises(JointSparError, match="new optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def test_a_step_that_was_refused_says_the_same_again_and_can_be_made_right():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=ALL)
    model(torch.tensor([1, 2])).sum().backward()
    messages = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as caught:
            optimizer.step()
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "plan" not in messages[0]
    model[0].weight.grad = model[0].weight.grad.to_dense()
    before = weights(model)
    optimizer.step()
    assert optimizer.stats.steps == 1 and not torch.equal(before, weights(model))


@pytest.mark.parametrize(
    ("check_every", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_check_every_must_be_a_number_of_steps(check_every, error):
    with pytest.raises(error, match="check_every"):
        js.JointSparLARS(make_model().parameters(), check_every=check_every)


def test_even_batches_alone_are_all_batches_each_with_its_step():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    for length in (0, 1, 4):
        seen = 0
        for batch in optimizer.even_batches(list(batches(length))):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
            seen += 1
        assert seen == length
    with pytest.raises(JointSparError, match="no step"):
        list(optimizer.even_batches(batches(2)))


@pytest.mark.parametrize("is_zipped", [False, True])
def test_loops_of_even_batches_within_each_other_end_with_what_to_do(is_zipped):
    """Each would take the other's last batch for its own."""
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())

    def step(batch):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()

    def train():
        if is_zipped:
            for batch, _ in zip(*(optimizer.even_batches(list(batches(length))) for length in (2, 3)), strict=False):
                step(batch)
        else:
            for _ in optimizer.even_batches(range(3)):
                for batch in optimizer.even_batches(list(batches(4))):
                    step(batch)

    with pytest.raises(JointSparError, match=r"another loop began before this one ended.*zip"):
        train()
    given_up = optimizer.even_batches(list(batches(5)))
    next(given_up)
    for batch in optimizer.even_batches(list(batches(2))):  # one that is left half-way is no hindrance
        step(batch)


def test_a_requested_stop_is_known_after_the_next_step():
    model = make_model()
    optimizer = js.JointSparLARS(model.named_parameters())
    train(model, optimizer, 1)
    optimizer.request_stop()
    assert not optimizer.stop_requested
    train(model, optimizer, 1)
    assert optimizer.stop_requested
