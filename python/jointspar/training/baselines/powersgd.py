"""PowerSGD: low-rank compression by one power iteration a step."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange import Slices, ring
from jointspar.training.baselines.carried import Carried


class PowerSgd(Carried):
    """Each matrix as P Q^T of rank `rank`: P = orthonormal(sum M Q), Q = sum M^T P, M with error feedback.

    A tensor is a matrix of its first dimension by all others. Q starts from the step before (warm start). Tensors of
    one dimension, and matrices that the two factors would not shorten, are summed as they are. Two ring sums of
    float32: of all P with the uncompressed tensors, then of all Q. Memory as in `Gathered`, of each rank's own part.

    shapes: of every parameter, in order. seed: of the first Q.
    Ranks orthonormalise by themselves, so their processors must round alike (`check_every` tells).
    Source: Vogels, Karimireddy & Jaggi 2019, Algorithm 1; Algorithm 2 but for its momentum, which is the optimizer's.
    """

    is_rank_local = True

    def __init__(self, shapes: Sequence[Sequence[int]], *, rank: int = 2, seed: int) -> None:
        self._matrices = [(shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape)) for shape in shapes]
        self._is_low_rank = [rows * columns > rank * (rows + columns) for rows, columns in self._matrices]
        sizes = [rows * columns for rows, columns in self._matrices]
        columns = [shape[1] for shape, is_low in zip(self._matrices, self._is_low_rank, strict=True) if is_low]
        first = np.random.default_rng(seed).standard_normal(rank * sum(columns), dtype=np.float32)
        self._q, self._memory = torch.from_numpy(first), torch.zeros(sum(sizes))
        super().__init__("powersgd", f"rank={rank}, seed={seed}", sizes, q=self._q, memory=self._memory)
        self._q_sizes = [rank * count for count in columns]
        self._rank = rank

    def __call__(self, transport: Transport, packed: torch.Tensor, *, what: str, slices: Slices | None = None) -> None:
        self._check_slices(slices)
        wanted = packed.float() + self._memory
        matrices, dense = self._split(wanted)
        old_q = [part.view(-1, self._rank) for part in self._q.split(self._q_sizes)]
        p, summed = _sum(
            transport, [matrix @ q for matrix, q in zip(matrices, old_q, strict=True)], dense, what=f"{what} of P"
        )
        p = [torch.linalg.qr(part).Q for part in p]
        new_q, _ = _sum(
            transport, [matrix.T @ part for matrix, part in zip(matrices, p, strict=True)], [], what=f"{what} of Q"
        )
        mean = self._join([part @ q.T for part, q in zip(p, new_q, strict=True)], summed)
        if mean.isfinite().all():  # else the optimizer skips this step, and so do memory and Q
            torch.sub(wanted, self._own_part(mean, wanted, transport.world_size), out=self._memory)
            self._q.copy_(_flat(new_q))
        packed.copy_(mean)
        self._round += 1

    def _own_part(self, mean: torch.Tensor, wanted: torch.Tensor, world_size: int) -> torch.Tensor:
        """What this rank gave of the mean: an equal share of the low-rank matrices, all that it had of the others."""
        parts = zip(mean.split(self._sizes), wanted.split(self._sizes), self._is_low_rank, strict=True)
        return torch.cat([sent / world_size if is_low else own for sent, own, is_low in parts])

    def _split(self, values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of the matrices to compress, and of all other tensors."""
        parts = [part.view(shape) for part, shape in zip(values.split(self._sizes), self._matrices, strict=True)]
        low = [part for part, is_low in zip(parts, self._is_low_rank, strict=True) if is_low]
        return low, [part for part, is_low in zip(parts, self._is_low_rank, strict=True) if not is_low]

    def _join(self, matrices: list[torch.Tensor], dense: list[torch.Tensor]) -> torch.Tensor:
        """The buffer of which `_split` would give these."""
        low, other = iter(matrices), iter(dense)
        return _flat([next(low) if is_low else next(other) for is_low in self._is_low_rank])


def _sum(
    transport: Transport, factors: list[torch.Tensor], dense: list[torch.Tensor], *, what: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sums over the ranks of both, in one message."""
    tensors = factors + dense
    buffer = _flat(tensors)
    ring(transport, buffer, what=what)
    parts = buffer.split([tensor.numel() for tensor in tensors])
    summed = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    return summed[: len(factors)], summed[len(factors) :]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(tensor.reshape(-1) for tensor in tensors)])
