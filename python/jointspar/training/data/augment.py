"""What happens to a batch of images that have their size already: random crop and flip, normalisation."""

from __future__ import annotations

import numpy as np
import torch

from jointspar.training.data.properties import DatasetProperties


def crop_and_flip(images: torch.Tensor, random: np.random.Generator, *, padding: int, flips: bool) -> torch.Tensor:
    """Pad each image by black pixels, cut a random window of the old size, mirror half of them where flips.

    images: uint8 [n, channels, size, size]; returns the same shape, new memory.
    """
    num_images, _, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.from_numpy(random.integers(0, 2 * padding + 1, size=(2, num_images, 1)))
    rows = top + torch.arange(size)
    columns = left + torch.arange(size)
    if flips:
        mirrored = torch.from_numpy(random.integers(0, 2, size=(num_images, 1)).astype(bool))
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(num_images)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def normalise(images: torch.Tensor, properties: DatasetProperties) -> torch.Tensor:
    """uint8 [n, channels, size, size] -> float32 of the same shape, (pixel / 255 - mean) / std."""
    mean = torch.tensor(properties.mean).view(1, -1, 1, 1)
    std = torch.tensor(properties.std).view(1, -1, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)
