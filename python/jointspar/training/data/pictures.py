"""Pictures of any size -> images of one size: decoding, and the transforms of ImageNet's training and test."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from jointspar.training.data.properties import DatasetProperties
from jointspar.training.data.readers import DatasetError, MissingPackageError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Source: TypeAlias = Callable[[], tuple[str, bytes]]  # gives the name and the content of a picture

SUFFIXES = (".jpg", ".jpeg", ".png")  # in lower case
MAX_PICTURE_BYTES = 1 << 26  # of a compressed picture
_MAX_PIXELS = (1 << 30) // 4 // 3  # where Pillow begins to warn; a small file must not fill the memory
_CROP_AREA = (0.08, 1.0)  # of the picture
_CROP_ASPECT = (3 / 4, 4 / 3)
_CROP_LOG_ASPECT = (math.log(_CROP_ASPECT[0]), math.log(_CROP_ASPECT[1]))
_CROP_ATTEMPTS = 10


@contextmanager
def open_picture(content: bytes, name: str, formats: tuple[str, ...] = ("JPEG", "PNG")) -> Iterator[Picture]:
    """A picture whose size is known and not too large; pixels are decoded on first use within the block.

    name: of its source, for the message. Raises DatasetError, also for what decoding raises within the block.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingPackageError("pillow is not installed: pip install 'jointspar[train]'") from error
    try:
        with Image.open(BytesIO(content), formats=formats) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise DatasetError(f"{name} is too large: {picture.width} x {picture.height} pixels")
            yield picture
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # that one shows an address
        raise DatasetError(f"{name} is damaged or not a {' or '.join(formats)} file{reason}") from error


def training_image(picture: Picture, properties: DatasetProperties, random: np.random.Generator) -> np.ndarray:
    """A random window, scaled to the image size and mirrored half of the time; uint8 [3, size, size]."""
    size = properties.image_size
    picture = _as_rgb(picture)
    image = _scaled(picture, (size, size), random_window(picture.width, picture.height, random))
    return np.ascontiguousarray(image[:, :, ::-1]) if random.integers(2) else image


def evaluation_image(picture: Picture, properties: DatasetProperties) -> np.ndarray:
    """The shorter side scaled to properties.resize, then the centre cut out; uint8 [3, size, size]."""
    size, shorter = properties.image_size, properties.resize
    picture = _as_rgb(picture)
    scale = shorter / min(picture.size)
    corners = []
    for side in picture.size:
        scaled = max(shorter, int(side * scale))
        first = round((scaled - size) / 2)
        corners.append((first * side / scaled, (first + size) * side / scaled))
    # Only the window is computed: a very narrow picture, scaled as a whole, would fill the memory.
    (left, right), (top, bottom) = corners
    return _scaled(picture, (size, size), (left, top, right, bottom))


def _as_rgb(picture: Picture) -> Picture:
    """Three channels of 8 bits. Pillow itself cuts 16-bit grey off at 255, which makes it white."""
    if picture.mode.startswith("I"):
        from PIL import Image

        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def random_window(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a window of 8 to 100 % of the area and an aspect of 3:4 to 4:3.

    Where ten draws do not fit in, the largest centred window of a fitting aspect. Source: Szegedy et al. 2015, as
    torchvision's RandomResizedCrop has it.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * random.uniform(*_CROP_AREA)
        aspect = math.exp(random.uniform(*_CROP_LOG_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _CROP_ASPECT[1])))
    h = min(height, max(1, round(width / _CROP_ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decode_batch(sources: Sequence[Source], properties: DatasetProperties, key: tuple[int, ...] | None) -> torch.Tensor:
    """Decode a batch on as many threads as torch has; Pillow decodes and scales without Python's lock.

    key: of the random numbers of training; None: for test.
    Returns uint8 [n, 3, size, size]. Raises DatasetError.
    """

    def decode(position: int) -> np.ndarray:
        name, content = sources[position]()
        with open_picture(content, name) as picture:
            if key is None:
                return evaluation_image(picture, properties)
            return training_image(picture, properties, np.random.default_rng((*key, position)))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(decode, range(len(sources))))))


def _scaled(picture: Picture, size: tuple[int, int], window: tuple[float, float, float, float]) -> np.ndarray:
    """A window scaled to (width, height), antialiased; uint8 [3, height, width]."""
    from PIL.Image import Resampling

    return np.asarray(picture.resize(size, Resampling.BILINEAR, box=window)).transpose(2, 0, 1)
