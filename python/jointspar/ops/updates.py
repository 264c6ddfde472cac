"""Updates of weights and momenta in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jointspar.arguments import (
    check_packed_kind,
    device_vector,
    element_count,
    flag,
    flags,
    increment_versions,
    like,
    on_plain_tensors,
    per_tensor,
    sequence,
    vector,
    whole_layout,
)
from jointspar.device_arrays import Place, place_of
from jointspar.ops.serving import Array, PerTensor, serving_of


class LarsNorms(NamedTuple):
    """What `lars_update` measured: float64 [num_tensors] each."""

    grad_norms: Array  # ||g|| of each gradient that was applied
    param_norms_after: Array  # ||w|| after the update: pass as param_norms next time


@on_plain_tensors
def lars_update(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    *,
    lr: PerTensor,
    momentum: PerTensor,
    weight_decay: PerTensor,
    trust_coefficient: PerTensor,
    eps: PerTensor,
    nesterov: bool = False,
    adapt: Sequence[bool] | Array | None = None,
    param_norms: Array | None = None,
    grad_norms: Array | None = None,
    skip_nonfinite: bool = False,
    layout: Sequence[int] | Array | None = None,
) -> LarsNorms:
    """LARS with momentum, in place on `params` and `momenta`, in one read-modify-write pass.

    local = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps), and 1 where ||w|| = 0, ||g|| = 0 or the
    tensor is not adapted; d = local * (g + weight_decay * w); u = momentum * u + d; w -= lr * u
    (nesterov: w -= lr * (d + momentum * u)).

    Args:
        params: num_tensors arrays of any float dtype; mutated.
        momenta: same shapes, float64 for float64 params, else float32; mutated.
        grads: arrays (None: zeros), or a packed 1-D buffer of their concatenation.
        lr, momentum, weight_decay, trust_coefficient, eps: one number, or one a tensor.
        adapt: bool [num_tensors]; default: tensors of two dimensions or more.
        param_norms: float64 [num_tensors], ||w|| as the last call returned it; NaN or None: measured here.
        grad_norms: float64 [num_tensors], ||g|| where already known; NaN or None: measured here.
        skip_nonfinite: where ||g|| of any gradient, given or measured, is not finite, params and momenta stay as they
            are, and param_norms_after are the norms before. So a float64 gradient whose norm overflows counts too,
            and one with a NaN does not where a finite norm is given.
        layout: sizes of the packed slices; default the sizes of `params`, which it must equal.

    Source: You, Gitman & Ginsburg 2017, with torch.optim's convention (lr outside the velocity).
    """
    params, momenta = sequence("params", params), sequence("momenta", momenta)
    num_tensors = len(params)
    hyper = np.empty((num_tensors, 5))
    for column, (name, value) in enumerate(
        (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay),
         ("trust_coefficient", trust_coefficient), ("eps", eps))
    ):  # fmt: skip
        hyper[:, column] = per_tensor(name, value, num_tensors)
    return lars_update_rows(
        params,
        momenta,
        _update_grads(params, momenta, grads, layout),
        hyper=hyper,
        nesterov=flag("nesterov", nesterov),
        adapt=_default_adapt(params) if adapt is None else flags("adapt", adapt, num_tensors),
        param_norms=param_norms,
        grad_norms=grad_norms,
        skip_nonfinite=flag("skip_nonfinite", skip_nonfinite),
    )


@on_plain_tensors
def lars_update_rows(
    params: list[Array],
    momenta: list[Array],
    grads: list[Array | None] | Array,
    *,
    hyper: np.ndarray,
    nesterov: bool,
    adapt: np.ndarray,
    param_norms: Array | None,
    grad_norms: Array | None,
    skip_nonfinite: bool,
) -> LarsNorms:
    """`lars_update` for callers that have checked numbers and flags already.

    hyper: float64 [num_tensors, 5]: lr, momentum, weight_decay, trust_coefficient, eps. adapt: bool [num_tensors].
    """
    like_array = params[0] if params else None
    serving, place = serving_of(like_array)
    measured = serving.lars_update(
        params,
        momenta,
        grads,
        hyper=hyper,
        adapt=adapt,
        nesterov=nesterov,
        param_norms=_known_norms("param_norms", param_norms, len(params), place),
        grad_norms=_known_norms("grad_norms", grad_norms, len(params), place),
        skip_nonfinite=skip_nonfinite,
    )
    increment_versions([*params, *momenta])
    return LarsNorms(like(like_array, measured[0]), like(like_array, measured[1]))


@on_plain_tensors
def sgd_update(
    params: Sequence[Array],
    momenta: Sequence[Array],
    grads: Sequence[Array | None] | Array,
    *,
    lr: PerTensor,
    momentum: PerTensor,
    weight_decay: PerTensor,
    nesterov: bool = False,
    skip_nonfinite: bool = False,
    layout: Sequence[int] | Array | None = None,
) -> Array:
    """SGD with momentum as `torch.optim.SGD` (dampening 0), in place on `params` and `momenta`.

    d = g + weight_decay * w; u = momentum * u + d; w -= lr * u (nesterov: w -= lr * (d + momentum * u)).
    Arguments as in `lars_update`. Returns grad_norms, float64 [num_tensors].
    """
    params, momenta = sequence("params", params), sequence("momenta", momenta)
    hyper = np.empty((len(params), 3))
    for column, (name, value) in enumerate((("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay))):
        hyper[:, column] = per_tensor(name, value, len(params))
    return sgd_update_rows(
        params,
        momenta,
        _update_grads(params, momenta, grads, layout),
        hyper=hyper,
        nesterov=flag("nesterov", nesterov),
        skip_nonfinite=flag("skip_nonfinite", skip_nonfinite),
    )


@on_plain_tensors
def sgd_update_rows(
    params: list[Array],
    momenta: list[Array],
    grads: list[Array | None] | Array,
    *,
    hyper: np.ndarray,
    nesterov: bool,
    skip_nonfinite: bool,
) -> Array:
    """`sgd_update` for callers that have checked numbers and flags already.

    hyper: float64 [num_tensors, 3]: lr, momentum, weight_decay.
    """
    like_array = params[0] if params else None
    norms = serving_of(like_array)[0].sgd_update(
        params, momenta, grads, hyper=hyper, nesterov=nesterov, skip_nonfinite=skip_nonfinite
    )
    increment_versions([*params, *momenta])
    return like(like_array, norms)


def _default_adapt(params: list[Array]) -> np.ndarray:
    return np.fromiter((getattr(param, "ndim", 0) > 1 for param in params), dtype=bool, count=len(params))


def _update_grads(params: list[Array], momenta: list[Array], grads: Any, layout: Any) -> Any:
    """Lists of one length, or a packed buffer whose layout is that of the parameters."""
    if len(momenta) != len(params):
        raise ValueError(f"momenta: {len(momenta)} arrays for {len(params)} params")
    if isinstance(grads, (list, tuple)):
        if layout is not None:
            raise TypeError("layout: only a packed buffer takes one, grads is a list")
        if len(grads) != len(params):
            raise ValueError(f"grads: {len(grads)} arrays for {len(params)} params")
        return list(grads)
    check_packed_kind("grads", grads, None)
    if layout is not None:
        sizes = [element_count(f"params[{index}]", param) for index, param in enumerate(params)]
        if not np.array_equal(whole_layout(layout, len(params)), sizes):
            raise ValueError("layout: differs from the sizes of params")
    return grads


def _known_norms(name: str, norms: Any, num_tensors: int, place: Place | None) -> Any:
    """On the host float64 [num_tensors], checked; on a device a device array, or None: measure all."""
    if norms is None:
        return np.full(num_tensors, np.nan) if place is None else None
    if place is not None and place_of(norms) is not None:
        return norms
    known = vector(name, norms, num_tensors)
    if (known < 0).any():
        raise ValueError(f"{name}: norms are at least 0 (NaN: measure)")
    return known if place is None else device_vector(name, known, place)
