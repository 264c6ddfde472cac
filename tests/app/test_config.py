"""TrainConfig: every flag acts or is refused, and the derived schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jointspar.training.config import COMPRESSORS, METHODS, SPARSE_FIELDS, TrainConfig

OUT = Path("unused")
SAMPLES = {
    "budget": 0.5, "strategy": "shared", "draw": "bernoulli", "distribution": "uniform", "bandit_lr": 0.1,
    "p_min": 0.1, "lag": 1, "grouping": "tensor", "inactive": "decay", "shift": True,
    "dense_epochs": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE_FIELDS)
@pytest.mark.parametrize("method", ["sgd", "lars", "topk", "powersgd-lars", "fp16"])
def test_dense_methods_refuse_the_flags_of_sampling(method: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} does not act with --method {method}"):
        TrainConfig(out=OUT, method=method, **{name: SAMPLES[name]})


@pytest.mark.parametrize("strategy", [None, "stratified"])
def test_shift_is_refused_where_layers_are_observed_with_another_chance(strategy: str | None) -> None:
    with pytest.raises(ValueError, match="--shift is for --strategy"):
        TrainConfig(out=OUT, distribution="bandit", shift=True, strategy=strategy)
    assert TrainConfig(out=OUT, distribution="bandit", shift=True, strategy="independent").shift


@pytest.mark.parametrize("method", ["sgd", "jointspar", "topk"])
def test_methods_without_lars_refuse_its_trust_coefficient(method: str) -> None:
    with pytest.raises(ValueError, match="--trust-coefficient does not act"):
        TrainConfig(out=OUT, method=method, trust_coefficient=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "value", "methods"),
    [("compression_ratio", 0.1, {"randomk", "topk"}), ("qsgd_levels", 3, {"qsgd"}), ("powersgd_rank", 4, {"powersgd"})],
)
def test_flags_of_compression_act_or_are_refused(method: str, name: str, value: Any, methods: set[str]) -> None:
    if method.removesuffix("-lars") in methods:
        assert getattr(TrainConfig(out=OUT, method=method, **{name: value}), name) == value
    else:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} does not act with --method {method}"):
            TrainConfig(out=OUT, method=method, **{name: value})


@pytest.mark.parametrize("name", ["wire_dtype", "exchange"])
@pytest.mark.parametrize("method", [*COMPRESSORS, "topk-lars"])
def test_compressors_say_themselves_what_is_sent(method: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} does not act with --method {method}"):
        TrainConfig(out=OUT, method=method, **{name: "ring" if name == "exchange" else "float32"})


def test_short_floats_on_the_wire_take_an_exchange_but_no_other_dtype() -> None:
    assert TrainConfig(out=OUT, method="fp16", exchange="ring").exchange == "ring"
    with pytest.raises(ValueError, match="--wire-dtype does not act with --method bf16"):
        TrainConfig(out=OUT, method="bf16", wire_dtype="float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "tiny"}, "--dataset 'tiny' is unknown: choose from digits"),
        ({"method": "topk", "compression_ratio": 0.0}, r"--compression-ratio must be in \(0, 1\], got 0"),
        ({"method": "randomk", "compression_ratio": 1.5}, "--compression-ratio must be"),
        ({"method": "topk", "compression_ratio": float("nan")}, "--compression-ratio must be"),
        ({"method": "qsgd", "qsgd_levels": 0}, "--qsgd-levels must be from 1 to 127, got 0"),
        ({"method": "qsgd", "qsgd_levels": 128}, "--qsgd-levels must be"),
        ({"method": "powersgd", "powersgd_rank": 0}, "--powersgd-rank must be at least 1"),
        ({"model": "vgg"}, "--model 'vgg' is unknown"),
        ({"dataset": "imagenet"}, "--model lenet5 takes .* --dataset imagenet has 224: choose from resnet18, resnet50"),
        ({"dataset": "imagenet", "model": "resnet20"}, "--model resnet20 takes images of 8 to 64 pixels"),
        ({"dataset": "mnist", "model": "resnet50"}, "--dataset mnist has 28: choose from lenet5, resnet20, resnet18"),
        ({"method": "adam"}, "--method 'adam' is unknown: choose from sgd"),
        ({"budget": 1.5}, "--budget 1.5 is out of range"),
        ({"budget": 0.0}, "--budget 0.0 is out of range"),
        ({"budget": float("nan")}, "--budget nan is out of range"),
        ({"budget": 0}, "--budget 0 is out of range: give at least 1 layer"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": -1}, "--batch-size must be at least 1"),
        ({"base_lr": 0.0}, "--base-lr must be positive"),
        ({"lr": float("inf")}, "--lr must be positive"),
        ({"lr": 0.1, "base_lr": 0.1}, "exclude each other"),
        ({"momentum": 1.0}, "--momentum"),
        ({"momentum": 0.0, "nesterov": True}, "--nesterov needs"),
        ({"method": "topk", "overlap": True}, "--overlap: --method topk takes all gradients at once"),
        ({"weight_decay": -1e-4}, "--weight-decay"),
        ({"milestones": (20.0, 10.0)}, "--milestones"),
        ({"milestones": (float("inf"),)}, "--milestones must be positive, finite"),
        ({"dense_epochs": 30.0}, "--dense-epochs 30 of 30 epochs leaves none"),
        ({"warmup_epochs": -1.0}, "--warmup-epochs"),
        ({"seed": -1}, "--seed"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"threads": 1025}, "--threads must be at most 1024, got 1025"),
        ({"threads": 10**20}, "--threads must be at most 1024, got 100000000000000000000"),
        ({"device": "tpu"}, "--device 'tpu' is unknown: choose from cpu, cuda"),
        ({"device": "cuda", "method": "topk"}, "--device cuda: --method topk makes its messages on the CPU"),
        ({"bandit_lr": 0.1}, "--bandit-lr acts only with --distribution bandit"),
    ],
)
def test_bad_value_is_named_with_its_flag(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(out=OUT, **changes)
    assert "\n" not in str(error.value)


def test_as_many_threads_as_any_machine_has_are_taken() -> None:
    assert [TrainConfig(out=OUT, threads=threads).threads for threads in (1, 1024)] == [1, 1024]


def test_schedule_of_90_epochs_is_the_papers_and_shorter_runs_keep_its_shape() -> None:
    whole, short = TrainConfig(out=OUT, epochs=90), TrainConfig(out=OUT, epochs=9)
    assert whole.warmup() == 5
    assert whole.schedule_milestones() == pytest.approx((30, 50, 70))
    assert short.warmup() == 1.5
    assert short.schedule_milestones() == pytest.approx((3, 5, 7))


def test_lr_is_the_rate_after_scaling() -> None:
    assert TrainConfig(out=OUT, lr=0.8, batch_size=64).scaled_base_lr(world_size=8) * 8 * 64 / 256 == pytest.approx(0.8)
    assert TrainConfig(out=OUT, base_lr=0.3).scaled_base_lr(world_size=8) == 0.3
