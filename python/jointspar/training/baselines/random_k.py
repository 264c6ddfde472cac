"""Random-k sparsification, with the same elements on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange import Slices, ring
from jointspar.training.baselines.carried import Carried
from jointspar.training.baselines.compressors import num_kept


class RandomK(Carried):
    """The share `ratio` of each tensor's elements, at least one, drawn anew in each step, times size / kept: unbiased.

    All ranks draw the same elements from `seed`, so no index travels and the values are summed by a ring of float32.
    There is no error feedback, and the variance grows by size / kept: a small ratio needs a small learning rate.

    Source: Konecny et al. 2016 (subsampling); the uniform sampling that Wangni et al. 2018 compare with.
    """

    def __init__(self, sizes: Sequence[int], *, ratio: float = 0.1, seed: int) -> None:
        super().__init__("randomk", f"ratio={ratio}, seed={seed}", sizes)
        self._seed = seed
        self._num_kept = [num_kept(ratio, size) for size in sizes]

    def __call__(self, transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None) -> None:
        self._check_slices(slices)
        kept, factors = self._draw()
        values = packed[kept].float() * factors
        ring(transport, values, what=what)
        packed.zero_()
        packed[kept] = values.to(packed.dtype)
        self._round += 1

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the buffer of what this step sends, and what each value is multiplied by."""
        random = self._random(self._seed)
        positions, factors, offset = [], [], 0
        for size, count in zip(self._sizes, self._num_kept, strict=True):
            positions.append(torch.from_numpy(offset + random.choice(size, count, replace=False, shuffle=False)))
            factors.append(torch.full((count,), size / max(count, 1)))
            offset += size
        return torch.cat(positions), torch.cat(factors)
