"""Networks in plain torch, on synthetic data: ResNet-50 and a transformer of 24 layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.shapes import BOTTLENECK_EXPANSION as EXPANSION
from bench.shapes import RESNET50_STAGES


def conv_norm(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; He et al. 2016, with the stride in the 3x3 convolution."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.conv = conv_norm(channels, width, 1), conv_norm(width, width, 3, stride)
        self.expand = conv_norm(width, EXPANSION * width, 1)
        is_same = stride == 1 and channels == EXPANSION * width
        self.shortcut = nn.Identity() if is_same else conv_norm(channels, EXPANSION * width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(self.conv(self.reduce(x).relu()).relu())
        return (y + self.shortcut(x)).relu()


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """25.6 million parameters in 161 tensors."""
    blocks: list[nn.Module] = []
    channels = 64
    for stage, (width, num_blocks) in enumerate(RESNET50_STAGES):
        for block in range(num_blocks):
            blocks.append(Bottleneck(channels, width, stride=2 if stage > 0 and block == 0 else 1))
            channels = EXPANSION * width
    stem = [conv_norm(3, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Transformer(nn.Module):
    """Predicts tokens with `num_layers` encoder layers of torch; 0.3 billion parameters at width 1024."""

    def __init__(self, num_layers: int = 24, width: int = 1024, vocabulary: int = 16384) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=width // 64, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens))).flatten(0, 1)


@dataclass
class Workload:
    """A network with one batch that it sees again and again."""

    model: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.inputs.device.type, dtype=torch.bfloat16):
            return nn.functional.cross_entropy(self.model(self.inputs), self.targets)


def resnet50_workload(device: str, batch: int) -> Workload:
    torch.manual_seed(0)
    model = resnet50().to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    return Workload(model, images, torch.randint(1000, (batch,), device=device))


def transformer_workload(device: str, batch: int, length: int = 512, **sizes: int) -> Workload:
    torch.manual_seed(0)
    model = Transformer(**sizes).to(device)
    tokens = torch.randint(model.embedding.num_embeddings, (batch, length), device=device)
    return Workload(model, tokens, tokens.flatten())


WORKLOADS: dict[str, Callable[[str, int], Workload]] = {
    "resnet50": resnet50_workload,
    "transformer": transformer_workload,
}
