"""LeNet-5 and residual networks, with seeded standard initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from jointspar.training.config import MODELS, fits

_LARGEST_SMALL_IMAGE = 64  # of those that ResNet-18 begins on at full resolution


def build_model(name: str, in_channels: int, num_classes: int, image_size: int, seed: int = 0) -> nn.Module:
    """Build lenet5, resnet20, resnet18 or resnet50, float32 on CPU, with weights from `seed`.

    Convolutions: He normal, fan out; norms: 1 and 0; linear layers and LeNet-5: torch's defaults. The global random
    state is left as it was. Raises ValueError for an unknown name or an image size that the model cannot take.
    """
    if name not in _BUILDERS:
        raise ValueError(f"model {name!r} is unknown: choose from {', '.join(_BUILDERS)}")
    if not fits(name, image_size):
        smallest, largest = MODELS[name]
        raise ValueError(f"model {name} takes images of {smallest} to {largest} pixels a side, got {image_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name](in_channels, num_classes, image_size)


class LeNet5(nn.Module):
    """LeCun et al. 1998 with ReLU and max pooling; 28 x 28 images are padded to 32 x 32 by the first convolution."""

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        padding = 2 if image_size < 32 else 0
        map_size = ((image_size + 2 * padding - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * map_size**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc3(functional.relu(self.fc2(x)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int, shortcut: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(in_width, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1 to four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int, shortcut: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut(in_width, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every stride-th pixel, zeros for the new channels. No parameters."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, out_width - in_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)) if self.extra else x


def projected_shortcut(in_width: int, out_width: int, stride: int) -> nn.Module:
    """Option B: a 1 x 1 convolution and norm where the shape changes, else the identity."""
    if in_width == out_width and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_width, out_width, 1, stride, bias=False), nn.BatchNorm2d(out_width))


class ResNet(nn.Module):
    """A stem, stages of residual blocks that halve the map after the first, global average pooling, a linear layer."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks_per_stage: tuple[int, ...],
        widths: tuple[int, ...],
        stem: nn.Module,
        shortcut: Callable[[int, int, int], nn.Module],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        stages: list[nn.Module] = []
        in_width = widths[0] if block is BasicBlock else 64
        for stage, (num_blocks, width) in enumerate(zip(blocks_per_stage, widths, strict=True)):
            blocks: list[nn.Module] = []
            for k in range(num_blocks):
                blocks.append(block(in_width, width, 2 if stage > 0 and k == 0 else 1, shortcut))
                in_width = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(in_width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.stem(images))
        return self.head(x.mean(dim=(2, 3)))


def _small_stem(in_channels: int, width: int) -> nn.Module:
    """3 x 3 at full resolution, for small images."""
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _imagenet_stem(in_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))


def _resnet20(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    stem = _small_stem(in_channels, 16)
    return ResNet(BasicBlock, (3, 3, 3), (16, 32, 64), stem, PaddedShortcut, num_classes)


def _resnet18(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    is_small = image_size <= _LARGEST_SMALL_IMAGE
    stem = _small_stem(in_channels, 64) if is_small else _imagenet_stem(in_channels)
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), stem, projected_shortcut, num_classes)


def _resnet50(in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    stem = _imagenet_stem(in_channels)
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), stem, projected_shortcut, num_classes)


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet5": LeNet5,
    "resnet20": _resnet20,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
}
