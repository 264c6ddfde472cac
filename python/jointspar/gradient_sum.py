"""One step's gradients on their way to their sum: laid out by the plan, then packed and exchanged, bucket by bucket."""

from __future__ import annotations

import numpy as np
import torch

from jointspar.comm.transport import Transport
from jointspar.step.exchange import Chooser, Slices
from jointspar.step.packing import PackedLayout, Packer

_SAME = 1e-6  # of squared norms; not every backend adds them up alike in packing and measuring


class GradientSum:
    """What a step packs and exchanges. Every rank exchanges the same buckets in the same order.

    layout: of what any rank computes. wanted: bool [num_parameters], what this rank computes. scales: float64
    [num_parameters], into this rank's part of the mean. counts: int64 [num_layers], the ranks that compute each layer.
    `packed` is [layout.total], and the sum over the ranks at the end.
    """

    def __init__(
        self,
        packer: Packer,
        chooser: Chooser,
        comm: Transport,
        layout: PackedLayout,
        *,
        step: int,
        wanted: np.ndarray,
        scales: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        self._packer, self._chooser, self._comm = packer, chooser, comm
        self.sent_bytes = 0  # by this rank
        self._what = f"step {step} exchange"
        self._wanted, self._scales = wanted, scales
        self.layout, self.counts = layout, counts
        self.packed = packer.buffer(layout)
        self.exchange_name = chooser.choose(_slices(layout))  # one for all buckets
        self._norms: list[torch.Tensor | np.ndarray] = []  # by bucket

    def positions_to_compute(self, bucket: int) -> set[int]:
        """The parameters of a bucket whose gradients this rank computes."""
        positions = self.layout.buckets[bucket].positions
        return set(positions[self._wanted[positions]].tolist())

    @property
    def num_packed(self) -> int:
        """Buckets."""
        return len(self._norms)

    def pack_next(self) -> int:
        """Pack this rank's gradients of the next bucket, scaled, zeros for what others compute; the bucket's number."""
        bucket = self.num_packed
        _, squared_norms = self._packer.pack(self.layout.buckets[bucket], self._wanted, self._scales)
        self._norms.append(squared_norms)
        return bucket

    def has_other_norms(self) -> bool:
        """Whether gradients that are packed have changed in their norms since."""
        for layout, before in zip(self.layout.buckets, self._norms, strict=False):
            now = self._packer.squared_norms(layout, self._wanted)
            if not np.allclose(now, before, rtol=_SAME, atol=0.0, equal_nan=True):
                return True
        return False

    def squared_norms(self) -> torch.Tensor | np.ndarray:
        """float64 [num_slices]: of this rank's gradients before they were scaled, once all are packed."""
        return self._norms[0] if len(self._norms) == 1 else np.concatenate(self._norms)

    def exchange(self, bucket: int) -> None:
        """Sum a packed bucket over the ranks, in place. Collective."""
        layout, sent_before = self.layout.buckets[bucket], self._comm.bytes_sent
        packed, slices = self._packer.buffer(layout), _slices(layout)
        self._chooser.exchange(self.exchange_name, packed, what=self._what, slices=slices)
        self.sent_bytes += self._comm.bytes_sent - sent_before


def _slices(layout: PackedLayout) -> Slices:
    return Slices(layout.sizes, layout.computed)
