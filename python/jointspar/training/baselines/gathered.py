"""The exchange of compressors whose messages cannot be added up: all ranks gather all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange import Slices
from jointspar.training.baselines.carried import Carried
from jointspar.training.baselines.compressors import Compressor
from jointspar.training.baselines.gather import all_gather


class Gathered(Carried):
    """Each rank compresses its part of the mean gradient, tensor by tensor; all decode all messages and add them.

    Each rank sends (world_size - 1) times its message. With a biased compressor, what it left out is added to the next
    gradient (error feedback): sent + memory is the sum of the gradients so far. The memory is of gradients, before
    learning rate and momentum. It stays as it was where the mean is not finite, as the optimizer skips that step.

    seed: of random numbers, which are each rank's own.
    """

    def __init__(self, compressor: Compressor, sizes: Sequence[int], *, seed: int) -> None:
        memory = {"memory": torch.zeros(sum(sizes))} if compressor.is_biased else {}
        super().__init__(compressor.name, f"{compressor}, seed={seed}", sizes, **memory)
        self.is_rank_local = compressor.is_biased
        self._compressor = compressor
        self._memory = memory.get("memory")
        self._seed = seed

    def __call__(self, transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None) -> None:
        self._check_slices(slices)
        wanted = packed.float() if self._memory is None else packed.float() + self._memory
        message = self._encode(wanted, self._random(self._seed, transport.rank))
        messages = all_gather(transport, message, what=what)
        mean = torch.zeros_like(wanted)
        for row in messages:
            mean += self._decode(row)
        if self._memory is not None and mean.isfinite().all():
            torch.sub(wanted, self._decode(message), out=self._memory)
        packed.copy_(mean)
        self._round += 1

    def _encode(self, values: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        parts = [self._compressor.encode(part, random) for part in values.split(self._sizes) if part.numel()]
        return torch.cat(parts)

    def _decode(self, message: torch.Tensor) -> torch.Tensor:
        sizes = [size for size in self._sizes if size]
        parts = message.split([self._compressor.num_bytes(size) for size in sizes])
        return torch.cat([self._compressor.decode(part, size) for part, size in zip(parts, sizes, strict=True)])
