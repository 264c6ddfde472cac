"""The parameter shapes of three networks, generated without torchvision, and of two lists of equal tensors."""

from __future__ import annotations

Shape = tuple[int, ...]

RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # (width, blocks)
RESNET18_STAGES = ((64, 2), (128, 2), (256, 2), (512, 2))
BOTTLENECK_EXPANSION = 4


def conv_and_norm(channels_in: int, channels_out: int, kernel: int) -> list[Shape]:
    """A convolution without bias and the weight and bias of the norm behind it."""
    return [(channels_out, channels_in, kernel, kernel), (channels_out,), (channels_out,)]


def resnet50_shapes(num_classes: int = 1000) -> list[Shape]:
    """25.6 million elements in 161 tensors, in the order of named_parameters()."""
    shapes = conv_and_norm(3, 64, 7)
    channels = 64
    for width, num_blocks in RESNET50_STAGES:
        for block in range(num_blocks):
            shapes += conv_and_norm(channels, width, 1) + conv_and_norm(width, width, 3)
            shapes += conv_and_norm(width, BOTTLENECK_EXPANSION * width, 1)
            if block == 0:
                shapes += conv_and_norm(channels, BOTTLENECK_EXPANSION * width, 1)
            channels = BOTTLENECK_EXPANSION * width
    return [*shapes, (num_classes, channels), (num_classes,)]


def resnet18_shapes(num_classes: int = 1000) -> list[Shape]:
    """11.7 million elements in 62 tensors, in the order of named_parameters()."""
    shapes = conv_and_norm(3, 64, 7)
    channels = 64
    for width, num_blocks in RESNET18_STAGES:
        for _ in range(num_blocks):
            shapes += conv_and_norm(channels, width, 3) + conv_and_norm(width, width, 3)
            if channels != width:
                shapes += conv_and_norm(channels, width, 1)
            channels = width
    return [*shapes, (num_classes, channels), (num_classes,)]


def transformer_shapes(depth: int = 24, width: int = 512, vocabulary: int = 32768, length: int = 1024) -> list[Shape]:
    """A pre-norm decoder whose head shares the embedding: 92.9 million elements in 292 tensors."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = norm + attention + norm + feed_forward
    return [(vocabulary, width), (length, width), *(depth * block), *norm]


MODELS: dict[str, list[Shape]] = {
    "resnet18": resnet18_shapes(),
    "resnet50": resnet50_shapes(),
    "transformer24": transformer_shapes(),
    "in_cache": [(4348,)] * 161,  # 0.7 million elements
    "small": [(64,)] * 161,  # the whole call counts, not the elements
}
