"""Compressors of one tensor's gradient: its bytes on the wire, and back. One message per tensor, as in their papers.

All take float32 [size], size > 0, and an own random generator; a NaN or infinity in it is one in what is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from jointspar.training.baselines.bits import pack_bits, packed_size, unpack_bits


class Compressor(Protocol):
    """A lossy code whose length follows from the number of elements."""

    name: str
    is_biased: bool  # so that it needs error feedback

    def num_bytes(self, size: int) -> int:
        """Bytes of the message for so many elements."""

    def encode(self, values: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """float32 [size] to uint8 [num_bytes(size)]."""

    def decode(self, message: torch.Tensor, size: int) -> torch.Tensor:
        """uint8 [num_bytes(size)] to float32 [size]."""


@dataclass(frozen=True)
class TopK:
    """The share `ratio` of the elements, at least one, that are largest in magnitude: int32 indices, float32 values.

    Source: Aji & Heafield 2017; Stich, Cordonnier & Jaggi 2018 (with error feedback); per tensor as Lin et al. 2018,
    without the momentum correction and warm-up that those add.
    """

    ratio: float = 0.01
    name = "topk"
    is_biased = True

    def num_bytes(self, size: int) -> int:
        return 8 * num_kept(self.ratio, size)

    def encode(self, values: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        indices = values.abs().topk(num_kept(self.ratio, values.numel()), sorted=False).indices
        return torch.cat([_to_bytes(indices.int()), _to_bytes(values[indices])])

    def decode(self, message: torch.Tensor, size: int) -> torch.Tensor:
        indices, kept = message.chunk(2)
        decoded = torch.zeros(size)
        decoded[_from_bytes(indices, torch.int32).long()] = _from_bytes(kept, torch.float32)
        return decoded


@dataclass(frozen=True)
class ScaledSign:
    """Signs, one bit each, times the mean magnitude: mean(|v|) * sign(v), zero counting as positive.

    Source: Karimireddy et al. 2019, EF-signSGD; each rank compresses its own gradient and the mean of them is applied.
    """

    name = "signsgd"
    is_biased = True

    def num_bytes(self, size: int) -> int:
        return 4 + packed_size(size, 1)

    def encode(self, values: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        scale = values.abs().mean().reshape(1)
        return torch.cat([_to_bytes(scale), pack_bits((values >= 0).to(torch.uint8), 1)])

    def decode(self, message: torch.Tensor, size: int) -> torch.Tensor:
        signs = 2.0 * unpack_bits(message[4:], 1, size).float() - 1.0
        return _from_bytes(message[:4], torch.float32) * signs


@dataclass(frozen=True)
class Qsgd:
    """Each element rounded at random, without bias, to one of `levels` fractions of its bucket's largest, and a sign.

    Codes of fixed length (4 bits for 7 levels, 8 for 127) and one float32 for each bucket of 512. As in the paper's
    experiments the scale is the largest magnitude, not the norm; its Elias coding is left out.

    Source: Alistarh et al. 2017.
    """

    levels: int = 7  # 1 to 127
    bucket: int = 512
    name = "qsgd"
    is_biased = False

    @property
    def _width(self) -> int:
        return (2 * self.levels).bit_length()

    def num_bytes(self, size: int) -> int:
        return 4 * self._num_buckets(size) + packed_size(size, self._width)

    def encode(self, values: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        num_buckets = self._num_buckets(values.numel())
        padded = torch.nn.functional.pad(values, (0, num_buckets * self.bucket - values.numel()))
        scales = padded.view(num_buckets, self.bucket).abs().amax(dim=1)
        codes = _round_at_random(values, self._of_elements(scales, values.numel()), self.levels, random)
        return torch.cat([_to_bytes(scales), pack_bits(codes, self._width)])

    def decode(self, message: torch.Tensor, size: int) -> torch.Tensor:
        head = 4 * self._num_buckets(size)
        scales = self._of_elements(_from_bytes(message[:head], torch.float32), size)
        codes = unpack_bits(message[head:], self._width, size)
        return scales * ((codes.float() - self.levels) / self.levels)

    def _num_buckets(self, size: int) -> int:
        return -(-size // self.bucket)

    def _of_elements(self, scales: torch.Tensor, size: int) -> torch.Tensor:
        """Each element's bucket's scale."""
        return scales.repeat_interleave(self.bucket)[:size]


@dataclass(frozen=True)
class TernGrad:
    """Each element becomes -s, 0 or s at random, without bias, with s the largest magnitude: two bits each.

    Before that, magnitudes are clipped at 2.5 standard deviations (about zero, so that a tensor of one element stays).

    Source: Wen et al. 2017, with its layer-wise scales and gradient clipping; scales are not shared by the workers,
    since no server adds up codes here.
    """

    clip: float = 2.5
    name = "terngrad"
    is_biased = False

    def num_bytes(self, size: int) -> int:
        return 4 + packed_size(size, 2)

    def encode(self, values: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        bound = self.clip * values.square().mean().sqrt()
        clipped = torch.minimum(torch.maximum(values, -bound), bound)
        scale = clipped.abs().amax().reshape(1)
        return torch.cat([_to_bytes(scale), pack_bits(_round_at_random(clipped, scale, 1, random), 2)])

    def decode(self, message: torch.Tensor, size: int) -> torch.Tensor:
        return _from_bytes(message[:4], torch.float32) * (unpack_bits(message[4:], 2, size).float() - 1.0)


def num_kept(ratio: float, size: int) -> int:
    """How many of `size` elements a sparse method sends."""
    return min(size, max(1, round(ratio * size)))


def _round_at_random(
    values: torch.Tensor, scales: torch.Tensor, levels: int, random: np.random.Generator
) -> torch.Tensor:
    """Codes 0 to 2 * levels, uint8 [size], for -scale to scale; the expected level is the value.

    Where a scale is 0 the code is that of 0; where it is not finite the code says nothing, as what is decoded is not
    finite either.
    """
    uniform = torch.from_numpy(random.random(values.numel(), dtype=np.float32))
    exact = values.abs() / scales * levels
    level = (exact + uniform).floor().nan_to_num().clamp(max=levels)  # the sum may be rounded up to levels + 1
    return (levels + level * values.sign()).nan_to_num().to(torch.uint8)


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def _from_bytes(message: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return message.clone().view(dtype)  # aligned, wherever the message lies
