"""Codes of a few bits, packed without gaps."""

from __future__ import annotations

import numpy as np
import torch


def packed_size(num_codes: int, width: int) -> int:
    """Bytes that so many codes of `width` bits take."""
    return -(-num_codes * width // 8)


def pack_bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 codes below 2**width to uint8 [packed_size]; the lowest bit of the first code comes first."""
    bits = np.unpackbits(codes.numpy()[:, None], axis=1, count=width, bitorder="little")
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_bits(packed: torch.Tensor, width: int, num_codes: int) -> torch.Tensor:
    """The codes that `pack_bits` packed, uint8 [num_codes]."""
    bits = np.unpackbits(packed.numpy(), count=num_codes * width, bitorder="little").reshape(num_codes, width)
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")[:, 0])
