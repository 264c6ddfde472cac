"""Stage 3: local gradients <-> one flat buffer, and the layout of that buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from jointspar import ops
from jointspar.arguments import dtype_name, on_plain_tensors
from jointspar.errors import JointSparError, warn_user
from jointspar.ops.packing import pack_rows

_EVEN = 1.25  # a bucket's bytes of the busiest rank, over those of the mean rank


@dataclass(frozen=True)
class PackedLayout:
    """Which parameters a packed buffer holds, in order, each as one slice without padding, and who computed them."""

    positions: np.ndarray  # int64 [num_slices], into the parameters
    sizes: np.ndarray  # int64 [num_slices], elements
    computed: np.ndarray  # bool [world_size, num_slices]
    start: int = 0  # elements of the buffer before the first slice
    buckets: tuple[PackedLayout, ...] = ()  # parts of this, in the order in which backward is expected to finish them

    @cached_property
    def total(self) -> int:
        """Elements of all slices."""
        return int(self.sizes.sum())

    def part(self, first: int, last: int) -> PackedLayout:
        """The slices from `first` on, up to `last`."""
        chosen = slice(first, last)
        start = self.start + int(self.sizes[:first].sum())
        return PackedLayout(self.positions[chosen], self.sizes[chosen], self.computed[:, chosen], start)


class Packer:
    """Packs the gradients of active layers into one buffer, which grows to the largest layout that came.

    bucket_bytes: the buffer is cut into parts for which each rank has computed at least about as much, the last
    parameters, whose gradients come first, at its beginning; None: the buffer is one part.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        wire_dtype: torch.dtype | str | None,
        bucket_bytes: int | None = None,
    ) -> None:
        self._parameters = parameters
        self._names = names
        self._sizes = np.array([parameter.numel() for parameter in parameters], dtype=np.int64)
        wide = any(parameter.dtype == torch.float64 for parameter in parameters)
        exact = torch.float64 if wide else torch.float32
        self.wire_dtype = exact if wire_dtype is None else getattr(torch, dtype_name("wire_dtype", wire_dtype))
        self._buffer = torch.empty(0, dtype=self.wire_dtype, device=parameters[0].device)
        self._bucket_bytes = bucket_bytes
        self._warned: set[int] = set()
        self._kinds = [_kind(parameter) for parameter in parameters]
        self._strides = [parameter.stride() for parameter in parameters]
        self._pointers = [parameter.data_ptr() for parameter in parameters]

    @on_plain_tensors
    def check_parameters(self) -> None:
        """Raises JointSparError for a parameter that was moved or converted since this was built."""
        pointers = [parameter.data_ptr() for parameter in self._parameters]
        if pointers == self._pointers:  # nearly always; what `model.to` moves or converts has another
            return
        for name, parameter, kind in zip(self._names, self._parameters, self._kinds, strict=True):
            if _kind(parameter) != kind:
                raise JointSparError(
                    f"{name} was {_in_words(kind)} when the optimizer was built and is {_in_words(_kind(parameter))}: "
                    "build it after model.to(...) or anything else that moves or converts parameters"
                )
        self._pointers = pointers

    def dense_bytes(self, trainable: np.ndarray) -> int:
        """Bytes of a buffer that holds every trainable parameter (bool [num_parameters])."""
        return int(self._sizes[trainable].sum()) * self.wire_dtype.itemsize

    def layout(self, computed: np.ndarray) -> PackedLayout:
        """The layout of what any rank computes.

        Slices of the same ranks lie together within a bucket, so that they travel together.
        computed: bool [world_size, num_parameters].
        """
        positions = np.flatnonzero(computed.any(axis=0))
        if self._bucket_bytes is None and computed[:, positions].all():  # nothing to sort
            whole = PackedLayout(positions, self._sizes[positions], computed[:, positions])
            return replace(whole, buckets=(whole,))
        numbers = self._bucket_numbers(positions, computed[:, positions])
        order = np.lexsort([*computed[:, positions], numbers])
        positions, numbers = positions[order], numbers[order]
        whole = PackedLayout(positions, self._sizes[positions], computed[:, positions])
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), positions.size]
        return replace(whole, buckets=tuple(whole.part(first, last) for first, last in pairwise(cuts)))

    def _bucket_numbers(self, positions: np.ndarray, computed: np.ndarray) -> np.ndarray:
        """int64 [len(positions)]. A bucket that one rank has computed alone would fill one direction of a link."""
        numbers = np.zeros(positions.size, dtype=np.int64)
        if self._bucket_bytes is None:
            return numbers
        of_rank = np.cumsum((computed * self._sizes[positions])[:, ::-1], axis=1) * self.wire_dtype.itemsize
        before = np.zeros((len(computed), 1), dtype=np.int64)
        while True:
            longest, mean = (of_rank - before).max(axis=0), (of_rank - before).mean(axis=0)
            ends = np.flatnonzero((longest >= self._bucket_bytes) & (longest <= _EVEN * mean))
            if ends.size == 0:
                return numbers
            numbers[: positions.size - 1 - ends[0]] += 1
            before = of_rank[:, ends[0], None]

    def buffer(self, layout: PackedLayout) -> torch.Tensor:
        """The memory of a layout, [layout.total] of the wire dtype; of a part, that part's."""
        end = layout.start + layout.total
        if self._buffer.numel() < end:
            if self._buffer.is_cuda:  # the stream under way may still read it, whichever one it was made on
                self._buffer.record_stream(torch.cuda.current_stream(self._buffer.device))
            self._buffer = self._buffer.new_empty(end)
        return self._buffer[layout.start : end]

    @on_plain_tensors
    def pack(
        self, layout: PackedLayout, computed: np.ndarray, scales: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | np.ndarray]:
        """Pack this rank's gradients, scaled, in one pass.

        Args:
            layout: whole, or a part of one whose buffer was asked for.
            computed: bool [num_parameters], those that this rank was to compute; the others pack zeros.
            scales: float64 [num_parameters].

        Returns: (packed [layout.total] of the wire dtype, squared norms float64 [num_slices] before scaling).
        An active parameter without a gradient packs zeros and warns once.
        """
        packed, grads = self.buffer(layout), self._grads(layout, computed)
        return packed, pack_rows(grads, scales[layout.positions], layout.sizes, packed)

    def squared_norms(self, layout: PackedLayout, computed: np.ndarray) -> np.ndarray:
        """Those that `pack` would return, of gradients on the host."""
        squared = np.zeros(layout.positions.size)
        grads = self._grads(layout, computed)
        present = [index for index, grad in enumerate(grads) if grad is not None]
        squared[present] = ops.squared_norms([grads[index] for index in present]) if present else 0.0
        return squared

    def _grads(self, layout: PackedLayout, computed: np.ndarray) -> list[torch.Tensor | None]:
        """In the parameters' own memory order; None: another rank's, or one that is missing."""
        grads: list[torch.Tensor | None] = []
        for position, is_wanted in zip(layout.positions.tolist(), computed[layout.positions].tolist(), strict=True):
            grad = self._parameters[position].grad if is_wanted else None
            is_plain = grad is not None and grad.layout is torch.strided and grad.stride() == self._strides[position]
            grads.append(grad if is_plain or not is_wanted else self._checked_grad(position))
        return grads

    def unpack_views(self, layout: PackedLayout, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the buffer's slices by parameter name, in the parameters' shapes."""
        views = {}
        offset = 0
        for position, size in zip(layout.positions.tolist(), layout.sizes.tolist(), strict=True):
            parameter = self._parameters[position]
            views[self._names[position]] = packed[offset:].as_strided(parameter.shape, parameter.stride())
            offset += size
        return views

    def _checked_grad(self, position: int) -> torch.Tensor | None:
        """A gradient that may be missing, sparse, or of another memory order than its parameter."""
        parameter = self._parameters[position]
        grad = parameter.grad
        if grad is None:
            self._warn_once(position)
            return None
        if grad.layout is not torch.strided:
            name = self._names[position]
            raise ValueError(f"{name} has a sparse gradient; use a dense one (Embedding(sparse=False))")
        if not _has_same_order(grad, parameter):
            grad = torch.empty_like(parameter, dtype=grad.dtype, requires_grad=False).copy_(grad)
        return grad

    def _warn_once(self, position: int) -> None:
        if position in self._warned:
            return
        self._warned.add(position)
        warn_user(
            f"{self._names[position]} was active but got no gradient: it counts as zero, so that momentum and weight "
            "decay still move it. Right if the loss does not depend on it in this step; wrong inside "
            "torch.utils.checkpoint with use_reentrant=True (pass False), or where the model has other parameters now "
            "(load_state_dict(assign=True): build the optimizer after it)"
        )


def _has_same_order(grad: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether elements lie in memory alike: dimensions of size 1 may have any stride (1x1 kernels in channels_last)."""
    if grad.stride() == parameter.stride():
        return True
    pairs = zip(grad.stride(), parameter.stride(), parameter.shape, strict=True)
    return all(mine == other for mine, other, size in pairs if size != 1)


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...]]:
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def _in_words(kind: tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...]]) -> str:
    dtype, device, shape, strides = kind
    return f"{dtype} of shape {shape}, strides {strides}, on {device}"


def gradient_scales(strategy: str, drawn_probabilities: np.ndarray, counts: np.ndarray, world_size: int) -> np.ndarray:
    """Factors that make the sum over ranks an unbiased mean gradient; float64 of the shape of `counts`.

    1 / (p * M) where ranks draw by themselves or all alike, 1 / (k * min(1, M * p)) for the k ranks of a stratified
    draw. 0 where nobody computed the layer.

    Args:
        counts: int64 [num_layers] (or more dimensions before), the number of ranks k that computed each layer.
    """
    if strategy == "stratified":
        divisor = counts * np.minimum(1.0, world_size * drawn_probabilities)
    else:
        divisor = world_size * drawn_probabilities
    return np.divide(1.0, divisor, out=np.zeros(counts.shape), where=counts > 0)
