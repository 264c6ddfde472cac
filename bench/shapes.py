"""The parameter shapes of ResNet-50 (25.6 million elements in 161 tensors), generated without torchvision."""

from __future__ import annotations

Shape = tuple[int, ...]

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # (width, blocks)
EXPANSION = 4


def conv_and_norm(channels_in: int, channels_out: int, kernel: int) -> list[Shape]:
    """A convolution without bias and the weight and bias of the norm behind it."""
    return [(channels_out, channels_in, kernel, kernel), (channels_out,), (channels_out,)]


def resnet50_shapes(num_classes: int = 1000) -> list[Shape]:
    """In the order of named_parameters(): stem, 16 bottleneck blocks, classifier."""
    shapes = conv_and_norm(3, 64, 7)
    channels = 64
    for width, num_blocks in STAGES:
        for block in range(num_blocks):
            shapes += conv_and_norm(channels, width, 1) + conv_and_norm(width, width, 3)
            shapes += conv_and_norm(width, EXPANSION * width, 1)
            if block == 0:
                shapes += conv_and_norm(channels, EXPANSION * width, 1)
            channels = EXPANSION * width
    return [*shapes, (num_classes, channels), (num_classes,)]
