"""Gradients into a packed buffer and out of it, and the sums of packed buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jointspar.arguments import (
    check_packed_kind,
    flag,
    increment_versions,
    like,
    new_packed,
    on_plain_tensors,
    per_tensor,
    sequence,
    sizes_of,
    whole_layout,
)
from jointspar.ops.serving import Array, PerTensor, serving_of


@on_plain_tensors
def pack_gradients(
    grads: Sequence[Array | None],
    scales: PerTensor,
    *,
    wire_dtype: Any = None,
    layout: Sequence[int] | Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Scale, cast and concatenate gradients, measuring their squared norms in the same pass.

    packed slice k = cast(grads[k] * scales[k]); the product is formed in float32 (float64 where gradient or wire
    is float64) and rounded to the wire (float64 reaches 16-bit types through float32, as in torch).

    Args:
        grads: num_tensors arrays of float32, float64, bfloat16 or float16. None packs zeros and needs `layout`.
        scales: one number or [num_tensors], finite; 1 / (p * world_size) in a JointSpar step. Where the
            product is float32, one beyond it is infinite: it gives infinities, and NaN for zeros.
        wire_dtype: dtype of the packed buffer; default float32, or float64 when a gradient is float64.
        layout: int64 [num_tensors], elements of each slice; default the sizes of `grads`.
        out: 1-D buffer of sum(layout) elements, written and returned.

    Returns: (packed 1-D, squared_norms float64 [num_tensors] of the unscaled gradients).
    Source: Liu & Mozafari 2022, Algorithm 2 (g / p).
    """
    grads = sequence("grads", grads)
    sizes = sizes_of("grads", grads) if layout is None else whole_layout(layout, len(grads))
    scale_per_tensor = per_tensor("scales", scales, len(grads), low=-np.inf)
    if out is None:
        out = new_packed(grads, int(sizes.sum()), wire_dtype)
    else:
        check_packed_kind("out", out, wire_dtype)
    like_array = next((grad for grad in grads if grad is not None), out)
    norms = serving_of(like_array)[0].pack_gradients(grads, scale_per_tensor, sizes, out)
    increment_versions([out])
    return out, like(like_array, norms)


@on_plain_tensors
def pack_rows(grads: list[Array | None], scales: np.ndarray, sizes: np.ndarray, out: Array) -> Array:
    """`pack_gradients` for callers that have checked scales (float64) and sizes (int64) already; the squared norms.

    Those of arrays on the host are a NumPy array, whatever the library of `out`.
    """
    squared_norms: Array = serving_of(out)[0].pack_gradients(grads, scales, sizes, out)
    increment_versions([out])
    return squared_norms


@on_plain_tensors
def unpack_gradients(packed: Array, outs: Sequence[Array], *, add: bool = False) -> None:
    """Copy (or add) the slices of a packed buffer into `outs`, which are mutated.

    Args:
        packed: 1-D, the concatenation of tensors of the sizes of `outs`.
        outs: arrays of any float dtype; values are cast.
        add: add to what is there instead.
    """
    outs = sequence("outs", outs)
    check_packed_kind("packed", packed, None)
    serving_of(packed)[0].unpack_gradients(packed, outs, flag("add", add))
    increment_versions(outs)


@on_plain_tensors
def add_packed(out: Array, packed: Array) -> None:
    """out += packed, both 1-D of one dtype and size; `out` is mutated. 16-bit types are added in float32."""
    check_packed_kind("out", out, None)
    check_packed_kind("packed", packed, None)
    serving_of(out)[0].add_packed(out, packed)
    increment_versions([out])


@on_plain_tensors
def squared_norms(grads: Sequence[Array] | Array, *, layout: Sequence[int] | Array | None = None) -> Array:
    """Squared Euclidean norms, float64 [num_tensors], of arrays or of the slices of a packed buffer.

    NaN or Inf exactly where the data holds one (or, in float64, a value above 1e154).
    Bit-identical for every number of threads.
    """
    if isinstance(grads, (list, tuple)):
        if layout is not None:
            raise TypeError("layout: only a packed buffer takes one, grads is a list")
        first = grads[0] if grads else None
        return like(first, serving_of(first)[0].squared_norms(list(grads), None))
    check_packed_kind("grads", grads, None)
    if layout is None:
        raise TypeError("layout: a packed buffer needs the sizes of its slices")
    return like(grads, serving_of(grads)[0].squared_norms(grads, whole_layout(layout, None)))
