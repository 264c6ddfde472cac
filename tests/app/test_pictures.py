"""Transforms of pictures against their definitions, and pictures that nobody should decode."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import picture_bytes
from jointspar.training.data.pictures import (
    decode_batch,
    evaluation_image,
    open_picture,
    random_window,
    training_image,
)
from jointspar.training.data.properties import PROPERTIES
from jointspar.training.data.readers import DatasetError

SMALL = replace(PROPERTIES["imagenet"], image_size=16, resize=20)


def gradient_picture(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (224, 224), (30, 700), (1, 1)])
def test_windows_lie_inside_with_the_promised_area_and_aspect(width: int, height: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = random_window(width, height, random)
        w, h = right - left, bottom - top
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) > 200:
            assert 0.07 < w * h / (width * height) <= 1
        if min(width, height) > 20:
            assert 0.7 < w / h < 1.4


def test_windows_of_a_square_are_spread_as_torchvisions() -> None:
    """Uniform area in [0.08, 1] with mean 0.54, less the draws that do not fit; log-uniform aspect around 1."""
    random = np.random.default_rng(0)
    windows = np.array([random_window(1000, 1000, random) for _ in range(4000)])
    w, h = windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1]
    assert 0.45 < (w * h).mean() / 1e6 < 0.54
    assert abs(np.log(w / h).mean()) < 0.02
    assert abs((windows[:, 0] + windows[:, 2]).mean() / 2 - 500) < 10


@pytest.mark.parametrize(("width", "height"), [(50, 30), (30, 50), (20, 20), (16, 90), (10, 10)])
def test_evaluation_takes_the_centre_of_the_scaled_picture(width: int, height: int) -> None:
    picture = gradient_picture(width, height)
    short = min(width, height)
    scaled = picture.resize((max(20, 20 * width // short), max(20, 20 * height // short)), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 16) / 2), round((scaled.height - 16) / 2)
    expected = np.asarray(scaled.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1)
    got = evaluation_image(picture, SMALL)
    assert got.shape == (3, 16, 16)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_training_mirrors_half_of_the_pictures() -> None:
    picture = gradient_picture(40, 30)
    images = [training_image(picture, SMALL, np.random.default_rng(k)).astype(int) for k in range(200)]
    mirrored = [image[0, 8, 0] > image[0, 8, -1] for image in images]
    assert 70 < sum(mirrored) < 130
    assert all(image[1, 0, 8] < image[1, -1, 8] for image in images)  # never upside down


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    picture = Image.new(mode, (30, 30), 1 if mode in ("L", "P", "1", "I;16") else None)
    assert evaluation_image(picture, SMALL).shape == (3, 16, 16)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    shades = np.repeat(np.linspace(0, 65535, 30).astype(np.uint16)[None], 30, axis=0)
    saved = io.BytesIO()
    Image.fromarray(shades).save(saved, "PNG")
    with Image.open(saved) as picture:
        image = evaluation_image(picture, SMALL).astype(int)
    eight_bits = evaluation_image(Image.fromarray((shades // 256).astype(np.uint8)), SMALL)
    assert np.array_equal(image, eight_bits)
    assert image.max() - image.min() > 100


def test_batch_depends_on_its_key_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [partial(lambda content: ("name", content), picture_bytes()) for _ in range(5)]
    first = decode_batch(sources, SMALL, (1, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(decode_batch(sources, SMALL, (1, 2)), first)
    assert not torch.equal(decode_batch(sources, SMALL, (1, 3)), first)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds a few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def gif_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a JPEG or PNG"),
        (b"<html>not found</html>", "damaged or not a JPEG or PNG"),
        (picture_bytes()[:-300], "damaged or not a JPEG or PNG"),
        (picture_bytes(kind="PNG")[:-300], "damaged or not a JPEG or PNG"),
        (gif_bytes(), "damaged or not a JPEG or PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "damaged or not a JPEG or PNG"),  # would start a program
        (png_of_size(10_000, 10_000), "too large: 10000 x 10000"),
        (png_of_size(2**31 - 1, 2**31 - 1), "damaged or not a JPEG or PNG|too large"),
        (png_of_size(60_000, 100), "damaged or not a JPEG or PNG"),
    ],
)
def test_damaged_and_hostile_pictures_are_named(content: bytes, message: str) -> None:
    with (
        pytest.raises(DatasetError, match=f"n01440764_1.JPEG is ({message})") as error,
        open_picture(content, "n01440764_1.JPEG") as picture,
    ):
        picture.load()
    assert "\n" not in str(error.value)
    assert " at 0x" not in str(error.value)


def test_very_narrow_picture_does_not_fill_the_memory() -> None:
    assert evaluation_image(Image.new("RGB", (1_000_000, 1)), SMALL).shape == (3, 16, 16)
