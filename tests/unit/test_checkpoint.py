"""Checkpoints: exact resume, damage, other models."""

import json
import stat
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import jointspar as js
from jointspar import checkpoint, checkpoint_files
from jointspar.comm import run_simulated
from jointspar.errors import CheckpointError


def make(seed=0, width=4, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(width * 9, 3)
    )
    optimizer = js.JointSparLARS(
        model.named_parameters(), lr=0.3, sampling=js.Sampling(budget=0.5, distribution="bandit", **settings)
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 1, 5, 5)), torch.randint(0, 3, (6,))).backward()
        optimizer.step()
        scheduler.step()


def everything(model, optimizer, left_out=None):
    state = optimizer.state_dict()
    state["jointspar"].pop(left_out, None)
    tensors = [*model.state_dict().values(), *(entry["momentum_buffer"] for entry in state["state"].values())]
    return [tensor.clone() for tensor in tensors], str(state["param_groups"]), str(state["jointspar"])


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1] == second[1] and first[2] == second[2]


@pytest.mark.parametrize("lag", [0, 1])
def test_resume_is_bit_exact(tmp_path, lag):
    model, optimizer, scheduler = make(lag=lag)
    train(model, optimizer, scheduler, 5)
    folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, extra={"epoch": 2})
    assert folder.name == "step-00000005"
    train(model, optimizer, scheduler, 5)
    other = make(seed=9, lag=lag)
    extra = js.checkpoint.load(tmp_path, model=other[0], optimizer=other[1], scheduler=other[2])
    assert extra == {"epoch": 2}
    train(*other, 5)
    assert_equal(everything(model, optimizer), everything(other[0], other[1]))
    assert scheduler.state_dict() == other[2].state_dict()


def test_resume_carries_the_norms_that_lars_measured(tmp_path):
    model, optimizer, scheduler = make()
    train(model, optimizer, scheduler, 5)
    for parameter in model.parameters():  # unnoticed, so carried norms now have other bits than measured ones
        parameter.data.mul_(1 + 5e-7)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    train(model, optimizer, scheduler, 5)
    other = make(seed=9)
    js.checkpoint.load(tmp_path, model=other[0], optimizer=other[1], scheduler=other[2])
    train(*other, 5)
    assert_equal(everything(model, optimizer), everything(other[0], other[1]))


@pytest.mark.parametrize("other_scale", [7.0, 1 + 1e-9])
def test_norms_are_not_carried_to_other_weights(other_scale):
    def build(scale):
        model = nn.Linear(5, 3, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(scale * torch.arange(1.0, 16.0).reshape(3, 5))
        sampling = js.Sampling(budget=1.0)
        return model, js.JointSparLARS(model.parameters(), lr=0.5, weight_decay=0.1, eps=0.0, sampling=sampling)

    model, optimizer = build(1.0)
    optimizer.zero_grad()
    model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    other, other_optimizer = build(1.0)
    with torch.no_grad():
        other.weight.copy_(other_scale * model.weight)
    before = other.weight.detach().clone()
    other_optimizer.load_state_dict(optimizer.state_dict())
    other_optimizer.zero_grad()
    other(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    other_optimizer.step()
    grad = torch.ones(3, 5, dtype=torch.float64)
    local = 1e-3 * before.norm() / (grad.norm() + 0.1 * before.norm())
    expected = before - 0.5 * (0.9 * momentum + local * (grad + 0.1 * before))
    assert torch.allclose(other.weight, expected, rtol=1e-12, atol=0.0)


def test_a_state_with_norms_of_another_number_of_parameters_is_refused():
    _, optimizer, _ = make()
    state = optimizer.state_dict()
    state["jointspar"]["update"]["norms"] = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="norms"):
        optimizer.load_state_dict(state)


def test_the_last_two_stay_and_nobody_else_may_read_them(tmp_path):
    model, optimizer, scheduler = make()
    for _ in range(4):
        train(model, optimizer, scheduler, 1)
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    for path in (tmp_path / "step-00000004").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["manifest.json", "shared.safetensors", "rank-0.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage):
    model, optimizer, scheduler = make()
    train(model, optimizer, scheduler, 2)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    good = everything(model, optimizer)
    train(model, optimizer, scheduler, 1)
    path = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer) / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes({"flip": content, "truncate": content[: len(content) // 2], "empty": b""}[damage])
    other = make(seed=3)
    with pytest.warns(UserWarning, match="passing over"):
        js.checkpoint.load(tmp_path, model=other[0], optimizer=other[1])
    assert_equal(good, everything(other[0], other[1]))


def test_every_single_bit_flip_is_refused(tmp_path):
    model, optimizer, _ = make()
    folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    for path in folder.iterdir():
        content = path.read_bytes()
        for position in torch.randint(0, len(content) * 8, (20,), generator=generator).tolist():
            damaged = bytearray(content)
            damaged[position // 8] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError), pytest.warns(UserWarning, match="passing over"):
                js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
        path.write_bytes(content)
    js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("written", "instead"), [(b"1e-08", b"1E-08"), (b"0.9", b"0.90"), (b'"step": 0', b'"step":  0'), (b"\n}", b"\n }")]
)
def test_another_spelling_of_the_same_manifest_is_damage(tmp_path, written, instead):
    model, optimizer, _ = make()
    path = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer) / "manifest.json"
    content = path.read_bytes()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, instead))
    with pytest.raises(CheckpointError, match="its digest differs"), pytest.warns(UserWarning, match="passing over"):
        js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)


def test_nothing_there_and_other_models_are_refused_and_change_nothing(tmp_path):
    model, optimizer, _ = make()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        js.checkpoint.load(tmp_path / "absent", model=model, optimizer=optimizer)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    other, other_optimizer, _ = make(width=5)
    before = everything(other, other_optimizer)
    with pytest.raises(CheckpointError, match="another model"):
        js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    assert_equal(before, everything(other, other_optimizer))


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model, optimizer, scheduler = make()
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    train(model, optimizer, scheduler, 1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_files, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    monkeypatch.undo()
    assert js.checkpoint.load(tmp_path, model=model, optimizer=optimizer) == {}
    assert optimizer.state_dict()["jointspar"]["step"] == 0
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)


def test_the_manifest_is_plain_json_without_pickle(tmp_path):
    model, optimizer, scheduler = make()
    folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["world_size"] == 1 and set(manifest["files"]) == {"shared.safetensors", "rank-0.safetensors"}


def make_milestones(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5, 10], gamma=0.1)


def test_a_scheduler_with_whole_number_keys_resumes_exactly(tmp_path):
    model, optimizer, _ = make()
    scheduler = make_milestones(optimizer)
    train(model, optimizer, scheduler, 3)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    other, other_optimizer, _ = make(seed=4)
    other_scheduler = make_milestones(other_optimizer)
    js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer, scheduler=other_scheduler)
    rates = []
    for run in ((model, optimizer, scheduler), (other, other_optimizer, other_scheduler)):
        train(*run, 9)
        rates.append(run[1].param_groups[0]["lr"])
    assert rates[0] == rates[1] == pytest.approx(0.3 * 0.01)


SCHEDULERS = {
    "ExponentialLR": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.93**step),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
}
RATES = {
    **{str(dtype): lambda dtype=dtype: torch.tensor(0.1, dtype=dtype) for dtype in (torch.float32, torch.float64)},
    "torch.bfloat16": lambda: torch.tensor(0.1, dtype=torch.bfloat16),
    "one dimension": lambda: torch.tensor([0.1]),
    "numpy.float32": lambda: np.float32(0.1),
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_rate_that_rounds_as_no_float_does_resumes_bit_for_bit(tmp_path, rate, scheduler):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = js.JointSparSGD(model.named_parameters(), lr=RATES[rate]())
        return model, optimizer, SCHEDULERS[scheduler](optimizer)

    def go_on(run, steps):
        for step in steps:
            model, optimizer, schedule = run
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(5, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            schedule.step()

    whole, part, resumed = build(), build(), build()
    go_on(whole, range(15))
    go_on(part, range(5))
    js.checkpoint.save(tmp_path, model=part[0], optimizer=part[1], scheduler=part[2])
    js.checkpoint.load(tmp_path, model=resumed[0], optimizer=resumed[1], scheduler=resumed[2])
    go_on(resumed, range(5, 15))
    assert_equal(everything(*whole[:2]), everything(*resumed[:2]))
    expected, rate = whole[1].param_groups[0]["lr"], resumed[1].param_groups[0]["lr"]
    assert type(rate) is type(expected) and rate.dtype == expected.dtype and rate.shape == expected.shape
    assert str(whole[2].state_dict()["_last_lr"]) == str(resumed[2].state_dict()["_last_lr"])


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int64", "uint64", "float16", "bfloat16", "float32", "float64", "float8_e5m2"]
)
def test_numbers_in_tensors_come_back_as_they_were(tmp_path, dtype):
    kind = getattr(torch, dtype)
    values = [0.0, -0.0, 1 / 3, 1e-7, float("inf")] if kind.is_floating_point else [0, 1]
    values += [torch.iinfo(kind).max] if dtype.startswith(("int", "uint")) else []
    extra = {"numbers": [torch.tensor(value, dtype=torch.float64).to(kind) for value in values[:-1]]}
    extra["numbers"].append(torch.tensor([[values[-1]]], dtype=kind))
    model, optimizer, _ = make()
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, extra=extra)
    loaded = js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    for now, then in zip(loaded["numbers"], extra["numbers"], strict=True):
        assert now.dtype == then.dtype and now.shape == then.shape
        assert now.reshape(1).view(torch.uint8).tolist() == then.reshape(1).view(torch.uint8).tolist()


def test_a_checkpoint_with_rates_as_plain_numbers_loads_into_an_optimizer_with_tensors(tmp_path):
    """As earlier versions wrote them whatever they were."""
    model, optimizer, scheduler = make()
    train(model, optimizer, scheduler, 4)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    other, other_optimizer, other_scheduler = make(seed=1)
    other_optimizer.param_groups[0]["lr"] = torch.tensor(0.7)
    js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer, scheduler=other_scheduler)
    assert_equal(everything(model, optimizer), everything(other, other_optimizer))


def test_a_rate_comes_back_on_the_device_of_the_one_in_its_place(tmp_path, monkeypatch):
    model, optimizer, _ = make()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="meta")
    loaded = []
    monkeypatch.setattr(optimizer, "load_state_dict", lambda state: loaded.extend(state["param_groups"]))
    js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert loaded[0]["lr"].device.type == "meta"


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    model, optimizer, _ = make()
    for it, kind in ((object(), "object"), (torch.zeros(2), "Tensor")):
        with pytest.raises(TypeError, match=f"{kind} cannot be saved"):
            js.checkpoint.save(tmp_path / "new", model=model, optimizer=optimizer, extra={"it": it})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="keep"):
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, keep=0)


@pytest.mark.parametrize(
    "extra",
    [
        {"__pairs__": 3},
        {"a": {"__pairs__": [[1, 2]]}},
        {"__counter__": [], "b": 1},
        {"a": {"__pairs__": [], "__number__": ["torch.float32", 1.0]}},
        {"__number__": ["torch.float32", 1.0]},
    ],
)
def test_extra_comes_back_whatever_its_keys_are(tmp_path, extra):
    model, optimizer, _ = make()
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, extra=extra)
    assert js.checkpoint.load(tmp_path, model=model, optimizer=optimizer) == extra


def test_a_run_does_not_save_below_the_later_steps_of_another(tmp_path):
    model, optimizer, scheduler = make()
    train(model, optimizer, scheduler, 2)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    other, other_optimizer, _ = make()
    with pytest.raises(CheckpointError, match="later"):
        js.checkpoint.save(tmp_path, model=other, optimizer=other_optimizer)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)  # the same step again
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_two_optimizers_do_not_share_a_directory(tmp_path):
    """As of a GAN whose halves have the same shapes: each would replace the other's, and load it as its own."""
    (first, optimizer, _), (second, other, _) = make(), make(seed=1)
    js.checkpoint.save(tmp_path, model=first, optimizer=optimizer)
    before = everything(first, optimizer)
    with pytest.raises(CheckpointError, match="holds step-00000000 of another optimizer or run"):
        js.checkpoint.save(tmp_path, model=second, optimizer=other)
    js.checkpoint.load(tmp_path, model=first, optimizer=optimizer)
    assert_equal(before, everything(first, optimizer))
    js.checkpoint.save(tmp_path / "other", model=second, optimizer=other)


def test_after_a_restart_a_run_goes_on_in_all_its_directories(tmp_path):
    """As one for the last and one for the best epoch: the first to be loaded, the second to be saved in later."""
    model, optimizer, scheduler = make()
    for step, name in ((1, "best"), (2, "last")):
        train(model, optimizer, scheduler, step)
        js.checkpoint.save(tmp_path / name, model=model, optimizer=optimizer)
    model, optimizer, scheduler = make(seed=1)
    js.checkpoint.load(tmp_path / "last", model=model, optimizer=optimizer)
    train(model, optimizer, scheduler, 1)
    js.checkpoint.save(tmp_path / "best", model=model, optimizer=optimizer, keep=1)
    other, other_optimizer, scheduler = make()
    train(other, other_optimizer, scheduler, 9)
    for name in ("best", "last"):
        with pytest.raises(CheckpointError, match="another optimizer or run"):
            js.checkpoint.save(tmp_path / name, model=other, optimizer=other_optimizer)


@pytest.mark.parametrize("behind", [0, 1])
def test_ranks_of_which_one_has_missed_the_name_of_the_run_agree_again(tmp_path, behind):
    """As where the loss of a rank ended the first save."""

    def use(transport):
        model, optimizer, _ = make()
        optimizer._run = None if transport.rank == behind else f"{1:016x}"
        folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
        return optimizer._run, json.loads((folder / "manifest.json").read_text())["run"]

    names = run_simulated(2, use)
    assert len({*names[0], *names[1]}) == 1 and (names[0][0] == f"{1:016x}") == (behind == 1)


def test_a_run_that_began_before_runs_had_names_goes_on(tmp_path, monkeypatch):
    model, optimizer, scheduler = make()
    monkeypatch.setattr(checkpoint, "_agreed_run", lambda comm, run: "")
    write = checkpoint_files.write_manifest

    def write_without(folder, world_size, step, settings):
        settings.pop("run")
        write(folder, world_size, step, settings)

    monkeypatch.setattr(checkpoint_files, "write_manifest", write_without)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    monkeypatch.undo()
    model, optimizer, scheduler = make(seed=1)
    with pytest.raises(CheckpointError, match="another optimizer or run"):
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    for _ in range(2):
        train(model, optimizer, scheduler, 1)
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)


def test_a_manifest_that_cannot_be_read_now_is_not_taken_for_none(tmp_path, monkeypatch):
    """Another run's, perhaps, whose file system is busy: it would be deleted."""
    model, optimizer, _ = make()
    folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)

    def fail(path, *_):
        raise PermissionError(f"{path}: not now")

    monkeypatch.setattr(checkpoint_files, "check_plain", fail)
    other, other_optimizer, _ = make()
    with pytest.raises(CheckpointError, match="cannot be read now"):
        js.checkpoint.save(tmp_path, model=other, optimizer=other_optimizer)
    assert folder.exists()


def test_what_is_saved_stays_whatever_lies_beside_it(tmp_path):
    """Folders of later steps without a sound manifest are no reason to delete what was just saved."""
    model, optimizer, scheduler = make()
    (tmp_path / "step-00000009").mkdir(parents=True)
    (tmp_path / "step-00000008").mkdir()
    for _ in range(3):
        train(model, optimizer, scheduler, 1)
        folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, keep=1)
        assert folder.exists()
    assert len(list(tmp_path.glob("step-0000000[123]"))) == 1


def test_a_damaged_manifest_keeps_no_run_from_saving(tmp_path):
    model, optimizer, scheduler = make()
    folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    (folder / "manifest.json").write_text("{")
    train(model, optimizer, scheduler, 1)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)


def test_a_first_save_that_was_interrupted_at_its_end_can_be_repeated(tmp_path, monkeypatch):
    model, optimizer, scheduler = make()
    publish = checkpoint_files.publish

    def publish_and_fail(*arguments):
        publish(*arguments)
        raise OSError("the other rank has gone")

    monkeypatch.setattr(checkpoint_files, "publish", publish_and_fail)
    with pytest.raises(OSError, match="gone"):
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    monkeypatch.undo()
    train(model, optimizer, scheduler, 1)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000000", "step-00000001"]


def at_step(optimizer, step):
    state = optimizer.state_dict()
    state["jointspar"]["step"] = step
    optimizer.load_state_dict(state)


def test_steps_of_more_digits_than_eight_are_later(tmp_path):
    model, optimizer, scheduler = make()
    at_step(optimizer, 10**8 - 2)
    for step in range(10**8 - 1, 10**8 + 3):
        train(model, optimizer, scheduler, 1)
        folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, extra={"step": step})
        assert folder.name == f"step-{step}"
        kept = {f"step-{each}" for each in (step - 1, step) if each >= 10**8 - 1}
        assert {path.name for path in tmp_path.iterdir()} == kept
        assert js.checkpoint.load(tmp_path, model=model, optimizer=optimizer) == {"step": step}
    at_step(optimizer, 2**32 - 1)
    assert js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, keep=1).name == "step-4294967295"
    assert len(list(tmp_path.iterdir())) == 1
    at_step(optimizer, 99_999_999)
    with pytest.raises(CheckpointError, match="holds the later step-4294967295"):
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)


def test_folders_stand_in_the_order_of_their_steps_and_other_names_where_they_stood(tmp_path):
    names = ["step-", "step-00000002", "step-00000002-copy", "step-3", "step-00000010", "step-0099999999",
             "step-100000000", "step-4294967295", "step-best", "step-last"]  # fmt: skip
    for name in reversed(names):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000011").write_text("no folder")
    assert [path.name for path in checkpoint_files.checkpoints_in(tmp_path)] == names[::-1]


def test_a_run_that_loaded_an_earlier_one_saves_beside_it(tmp_path, monkeypatch):
    model, optimizer, scheduler = make()
    train(model, optimizer, scheduler, 2)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    model, optimizer, scheduler = make(seed=1)
    train(model, optimizer, scheduler, 3)
    with pytest.raises(
        CheckpointError, match="another optimizer or run"
    ):  # later than the other's, and not its successor
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    monkeypatch.chdir(tmp_path)
    js.checkpoint.load(".", model=model, optimizer=optimizer)
    train(model, optimizer, scheduler, 1)
    assert js.checkpoint.save(tmp_path, model=model, optimizer=optimizer).name == "step-00000003"


def test_after_a_fall_back_saving_goes_on(tmp_path):
    model, optimizer, scheduler = make()
    for steps in (1, 3):
        train(model, optimizer, scheduler, steps)
        folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    (folder / "shared.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passing over"):
        js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    train(model, optimizer, scheduler, 1)
    assert js.checkpoint.save(tmp_path, model=model, optimizer=optimizer).name == "step-00000002"
    assert sum(path.name.startswith("unusable-step-00000004") for path in tmp_path.iterdir()) == 1


def test_another_optimizer_or_grouping_is_refused_and_changes_nothing(tmp_path):
    model, optimizer, scheduler = make()
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    other = make(seed=6)[0]
    other_optimizer = js.JointSparLARS(other.named_parameters(), sampling=js.Sampling(grouping="tensor"))
    before = everything(other, other_optimizer)
    with pytest.raises(CheckpointError, match="layers"):
        js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    with pytest.raises(CheckpointError, match="scheduler"):
        js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer, scheduler=scheduler)
    assert_equal(before, everything(other, other_optimizer))


@pytest.mark.parametrize("strategy", ["stratified", "shared"])
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_ranks_goes_on_from_what_rank_0_had(tmp_path, strategy, saved_by, loaded_by):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        sampling = js.Sampling(strategy=strategy, distribution="bandit", lag=1)
        return model, js.JointSparLARS(model.named_parameters(), sampling=sampling, check_every=1)

    def go_on(model, optimizer, steps):
        for step in range(steps):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + optimizer.comm.rank)
            model(torch.randn(6, 3, generator=generator)).square().sum().backward()
            optimizer.step()
        return everything(model, optimizer, "lesson")

    def first(_):
        run = build()
        saved = go_on(*run, 4)
        js.checkpoint.save(tmp_path, model=run[0], optimizer=run[1], extra={"ranks": saved_by})
        return saved

    def second(_):
        run = build()
        assert js.checkpoint.load(tmp_path, model=run[0], optimizer=run[1]) == {"ranks": saved_by}
        loaded, probabilities = everything(*run, "lesson"), run[1].probabilities
        go_on(*run, 1)  # with lag=1 it would learn what the other number of ranks left to be learned
        assert torch.equal(run[1].probabilities, probabilities)
        return loaded, go_on(*run, 3)

    saved = js.comm.run_simulated(saved_by, first)[0]
    loaded = js.comm.run_simulated(loaded_by, second)
    for state, _ in loaded:
        assert_equal(saved, state)
    weights = [[tensor for tensor in later[0] if tensor.ndim == 2] for _, later in loaded]
    assert all(torch.equal(a, b) for other in weights for a, b in zip(weights[0], other, strict=True))
    assert not torch.equal(weights[0][0], saved[0][0])


def test_on_another_number_of_ranks_each_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    """With rank 0's on all of them dropout would leave out the same on each."""

    def build():
        model = nn.Linear(3, 4)
        return {"model": model, "optimizer": js.JointSparLARS(model.named_parameters())}

    js.comm.run_simulated(2, lambda _: js.checkpoint.save(tmp_path, **build()))
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for _ in range(2):
        js.comm.run_simulated(3, lambda _: js.checkpoint.load(tmp_path, **build()))
    assert len(set(seeds)) == 3 and sorted(seeds[:3]) == sorted(seeds[3:])


def test_another_number_of_ranks_is_refused_where_each_has_probabilities_of_its_own(tmp_path):
    def run(_):
        model, optimizer, _ = make(strategy="independent")
        if not list(tmp_path.glob("step-*")):
            js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
            return
        with pytest.raises(CheckpointError, match="was saved by 2 ranks, this job has 3"):
            js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)

    js.comm.run_simulated(2, run)
    with pytest.warns(UserWarning, match="refusing a checkpoint"):
        js.comm.run_simulated(3, run)


@contextmanager
def refused(message):
    with pytest.warns(UserWarning, match="refusing a checkpoint"), pytest.raises(CheckpointError, match=message):
        yield


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_checkpoint_that_cannot_be_read_for_now_stays_the_newest(tmp_path, monkeypatch, error):
    model, optimizer, scheduler = make()
    for steps in (1, 2):
        train(model, optimizer, scheduler, steps)
        folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    newest = everything(model, optimizer)

    def refuse(path):
        raise error("not now")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "sha256", refuse)
        with refused("step-00000003: cannot be read now"):
            js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert folder.is_dir()
    other = make(seed=3)
    js.checkpoint.load(tmp_path, model=other[0], optimizer=other[1])
    assert_equal(newest, everything(other[0], other[1]))


def test_a_checkpoint_of_a_later_format_stays_the_newest(tmp_path, monkeypatch):
    model, optimizer, scheduler = make()
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    train(model, optimizer, scheduler, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "FORMAT", 2)
        folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    with refused("has format 2, this version reads 1"):
        js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert folder.is_dir()


def test_a_model_whose_state_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = Odd(3, 2)
    optimizer = js.JointSparLARS(model.named_parameters())
    with pytest.raises(TypeError, match="_extra_state"):
        js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []
