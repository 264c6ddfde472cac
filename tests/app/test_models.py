"""Shapes, published sizes and seeding of the models."""

from __future__ import annotations

import pytest
import torch

from jointspar.training import models
from jointspar.training.config import MODELS
from jointspar.training.models import build_model


def size_of(model: torch.nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(parameter.numel() for parameter in parameters), len(parameters)


def test_every_name_of_the_command_line_is_built() -> None:
    assert tuple(models._BUILDERS) == tuple(MODELS)


@pytest.mark.parametrize(
    ("name", "in_channels", "num_classes", "expected"),
    [
        ("lenet5", 1, 10, (61_706, 10)),
        ("resnet20", 3, 10, (269_722, 59)),
        ("resnet18", 3, 10, (11_173_962, 62)),
        ("resnet50", 3, 1000, (25_557_032, 161)),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, in_channels: int, num_classes: int, expected: tuple[int, int]
) -> None:
    assert size_of(build_model(name, in_channels, num_classes, 32)) == expected


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "resnet18"])
@pytest.mark.parametrize(("in_channels", "image_size"), [(1, 28), (1, 32), (3, 32)])
def test_forward_gives_one_score_per_class(name: str, in_channels: int, image_size: int) -> None:
    model = build_model(name, in_channels, 10, image_size)
    assert model(torch.randn(2, in_channels, image_size, image_size)).shape == (2, 10)


def test_resnet50_takes_imagenet_sizes() -> None:
    model = build_model("resnet50", 3, 1000, 224).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_weights_come_from_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (build_model("resnet20", 1, 10, 28, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_residual_shortcut_without_parameters_keeps_every_second_pixel() -> None:
    x = torch.randn(1, 4, 6, 6)
    y = models.PaddedShortcut(4, 8, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


def test_resnet18_of_large_images_is_the_published_imagenet_network() -> None:
    model = build_model("resnet18", 3, 1000, 224).eval()
    assert size_of(model) == (11_689_512, 62)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_unknown_name_and_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="'vgg' is unknown: choose from lenet5"):
        build_model("vgg", 3, 10, 32)
    with pytest.raises(ValueError, match="lenet5 takes images of 16 to 64 pixels a side, got 8"):
        build_model("lenet5", 1, 10, 8)
