"""The fused operations of a JointSpar step, for torch tensors, NumPy and CuPy arrays, on the CPU or one CUDA device.

Arrays are read in memory order and must be dense (contiguous after some permutation of their dimensions, as
channels_last is); arrays that belong together (parameter, momentum, gradient) have the same shape and strides.
Small per-tensor vectors come back in the array library of the input. Bad arguments raise ValueError or TypeError
naming the argument; nothing was written then.

On CUDA arrays (torch, CuPy, or anything with DLPack or `__cuda_array_interface__`) an operation is put on the current
stream of the arrays' library and returns at once: results are device arrays, and no value of a device array is looked
at, so that NaN or out-of-range values in them raise nothing. Settings given as device arrays are copied to the host,
and norms, probabilities or a bound given as host values to the device: both wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from jointspar import backends
from jointspar.arguments import (
    check_packed_kind,
    check_range,
    copy_to,
    device_flags,
    device_scalar,
    device_vector,
    element_count,
    flag,
    flags,
    increment_versions,
    like,
    new_packed,
    per_tensor,
    sequence,
    sizes_of,
    vector,
    whole_layout,
    whole_number,
)
from jointspar.device_arrays import Place, place_of

Array = Any  # torch.Tensor, numpy.ndarray, cupy.ndarray or another array in CUDA memory
PerTensor = float | Sequence[float] | np.ndarray | torch.Tensor  # one number, or one a tensor

_chosen: ModuleType | None = None


def backend() -> ModuleType:
    """The module that serves the operations; chosen at the first call (see JOINTSPAR_BACKEND)."""
    global _chosen
    if _chosen is None:
        _chosen = backends.choose()
    return _chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the operations on CPU arrays from one backend ("native", "numba", "reference") inside a with block."""
    global _chosen
    before = _chosen
    _chosen = backends.load(name)
    try:
        yield
    finally:
        _chosen = before


def _serving(array: Array | None) -> tuple[Any, Place | None]:
    """What serves operations on arrays like this one, and the CUDA device that they are on (None: the CPU)."""
    place = place_of(array)
    return (backend(), None) if place is None else (backends.device_backend(place, array), place)


class LarsNorms(NamedTuple):
    """What `lars_update` measured: float64 [num_tensors] each."""

    grad_norms: Array  # ||g|| of each gradient that was applied
    param_norms_after: Array  # ||w|| after the update: pass as param_norms next time


STRATEGIES = ("independent", "stratified", "shared")
DRAWS = ("bernoulli", "systematic")
SMALLEST_PROBABILITY = 1e-100  # its cube, a divisor in Algorithm 1, is a normal number
LARGEST_LOG_WEIGHT = 1e300  # differences stay finite


def sample_layers(
    probabilities: Array,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    strategy: str = "independent",
    draw: str = "systematic",
    run_length: int | None = None,
    out: Array | None = None,
) -> Array:
    """Draw the active layers of one rank; P(active[d]) = probabilities[d] exactly.

    Random numbers are Philox4x32-10 with counter (step, rank, layer, purpose) and key `seed`, so that a draw depends on
    the arguments alone. "independent": each rank by itself. "stratified": one systematic draw, rotated over the
    ranks, so that floor/ceil(world_size * p) ranks take each layer. "shared": one set for all ranks.
    "systematic" takes floor/ceil(sum p) layers, "bernoulli" each layer independently of the others.

    Args:
        probabilities: float64 [num_layers], in [0, 1].
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**32.
        run_length: 1 <= run_length < 2**32, with draw="systematic" only. None walks the layers in random order, n in
            their own order, shuffled only within runs of n consecutive ones (the last may be shorter). Layers sorted
            by size then give sets that are nearly equal in size over ranks and steps: each stretch of the walk whose
            probabilities sum to one yields exactly one layer. Shuffling within runs keeps the sets random.
        out: bool [num_layers], written and returned.

    Returns: bool [num_layers].
    Source: Liu & Mozafari 2022, Algorithm 2; systematic and stratified draws and runs are extensions.
    """
    serving, place = _serving(probabilities)
    if place is None:
        p = vector("probabilities", probabilities)
        check_range("probabilities", p, 0.0, 1.0)
    else:
        p = device_vector("probabilities", probabilities, place)
    world_size = whole_number("world_size", world_size, 1, 2**24)
    active = serving.sample_layers(
        p,
        seed=whole_number("seed", seed, 0, 2**64 - 1),
        step=whole_number("step", step, 0, 2**32 - 1),
        rank=whole_number("rank", rank, 0, world_size - 1),
        world_size=world_size,
        strategy=_one_of("strategy", strategy, STRATEGIES),
        draw=_one_of("draw", draw, DRAWS),
        run_length=None if run_length is None else whole_number("run_length", run_length, 1, 2**32 - 1),
    )
    return copy_to("out", out, active) if out is not None else like(probabilities, active)


def project_probabilities(log_weights: Array, *, budget: float, p_min: float, out: Array | None = None) -> Array:
    """Project weights onto { p_min <= q <= 1, sum q = budget } in the KL divergence, exactly.

    q_d = clip(c * w_d, p_min, 1) with the c for which the sum is `budget` (KKT conditions).

    Args:
        log_weights: float64 [num_layers], log w_d; at most 1e300 in size, any spread.
        budget: expected number of active layers, num_layers * p_min <= budget <= num_layers.
        p_min: in (0, 1].
        out: float64 [num_layers], written and returned.

    Returns: float64 [num_layers].
    Source: Liu & Mozafari 2022, Algorithm 1, projection.
    """
    serving, place = _serving(log_weights)
    if place is None:
        log_w = vector("log_weights", log_weights)
        check_range("log_weights", log_w, -LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    else:
        log_w = device_vector("log_weights", log_weights, place)
    budget, p_min = _feasible(budget, p_min, len(log_w))
    projected = serving.project_probabilities(log_w, budget=budget, p_min=p_min)
    return copy_to("out", out, projected) if out is not None else like(log_weights, projected)


def update_probabilities(
    probabilities: Array,
    squared_norms: Array,
    active: Array,
    *,
    gradient_bound: float | Array,
    budget: float,
    p_min: float,
    bandit_lr: float,
    shift: bool = False,
    drawn_probabilities: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, float | Array]:
    """One step of Algorithm 1: importance-weighted exponentiated gradient, then the projection.

    L^2 <- max(0.99 L^2, max over active d of ||g_d||^2) first; with L = 0 or nothing active, probabilities stay.

    Args:
        probabilities: float64 [num_layers], in [1e-100, 1].
        squared_norms: float64 [num_layers], ||g_d||^2 of unscaled gradients; read where active.
        active: bool [num_layers].
        gradient_bound: L, not squared; 0 at the start. On a device it comes back as a device array of no dimension,
            which may be passed again.
        bandit_lr: step size; with shift it is the paper's alpha_p * L^2 / p_min^2.
        shift: the paper's literal loss, made non-negative by L^2 / p_min^2.
        drawn_probabilities: float64 [num_layers], what `active` was drawn from; default `probabilities`.
        out: float64 [num_layers], written and returned as the first item.

    Returns: (float64 [num_layers], the new gradient_bound).
    Source: Liu & Mozafari 2022, Algorithm 1.
    """
    drawn_probabilities = probabilities if drawn_probabilities is None else drawn_probabilities
    serving, place = _serving(probabilities)
    if place is None:
        p, drawn, n2, is_active = _bandit_vectors(probabilities, drawn_probabilities, squared_norms, active)
        bound: Any = _number("gradient_bound", gradient_bound, 0.0)
    else:
        p = device_vector("probabilities", probabilities, place)
        drawn = device_vector("drawn_probabilities", drawn_probabilities, place)
        n2 = device_vector("squared_norms", squared_norms, place)
        is_active = device_flags("active", active, place)
        bound = device_scalar("gradient_bound", gradient_bound, place)
    budget, p_min = _feasible(budget, p_min, len(p))
    updated, bound = serving.update_probabilities(
        p,
        n2,
        is_active,
        drawn_probabilities=drawn,
        gradient_bound=bound,
        budget=budget,
        p_min=p_min,
        bandit_lr=_number("bandit_lr", bandit_lr, 0.0),
        shift=flag("shift", shift),
    )
    bound = bound if place is None else bound.reshape(())
    return (copy_to("out", out, updated) if out is not None else like(probabilities, updated)), bound


def pack_gradients(
    grads: Sequence[Array | None],
    scales: PerTensor,
    *,
    wire_dtype: Any = None,
    layout: Sequence[int] | Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Scale, cast and concatenate gradients, measuring their squared norms in the same pass.

    packed slice k = cast(grads[k] * scales[k]); the product is formed in float32 (float64 for float64 gradients)
    and rounded to the wire (float64 reaches 16-bit types through float32, as in torch).

    Args:
        grads: num_tensors arrays of float32, float64, bfloat16 or float16. None packs zeros and needs `layout`.
        scales: one number or [num_tensors], finite; 1 / (p * world_size) in a JointSpar step.
        wire_dtype: dtype of the packed buffer; default float32, or float64 when a gradient is float64.
        layout: int64 [num_tensors], elements of each slice; default the sizes of `grads`.
        out: 1-D buffer of sum(layout) elements, written and returned.

    Returns: (packed 1-D, squared_norms float64 [num_tensors] of the unscaled gradients).
    Source: Liu & Mozafari 2022, Algorithm 2 (g / p).
    """
    grads = sequence("grads", grads)
    sizes = sizes_of("grads", grads) if layout is None else whole_layout(layout, len(grads))
    scale_per_tensor = per_tensor("scales", scales, len(grads), low=-np.inf)
    like_array = next((grad for grad in grads if grad is not None), out)
    if out is None:
        out = new_packed(grads, int(sizes.sum()), wire_dtype)
    else:
        check_packed_kind("out", out, wire_dtype)
    norms = _serving(like_array)[0].pack_gradients(grads, scale_per_tensor, sizes, out)
    increment_versions([out])
    return out, like(like_array, norms)


def unpack_gradients(packed: Array, outs: Sequence[Array], *, add: bool = False) -> None:
    """Copy (or add) the slices of a packed buffer into `outs`, which are mutated.

    Args:
        packed: 1-D, the concatenation of tensors of the sizes of `outs`.
        outs: arrays of any float dtype; values are cast.
        add: add to what is there instead.
    """
    outs = sequence("outs", outs)
    check_packed_kind("packed", packed, None)
    _serving(packed)[0].unpack_gradients(packed, outs, flag("add", add))
    increment_versions(outs)


def add_packed(out: Array, packed: Array) -> None:
    """out += packed, both 1-D of one dtype and size; `out` is mutated. 16-bit types are added in float32."""
    check_packed_kind("out", out, None)
    check_packed_kind("packed", packed, None)
    _serving(out)[0].add_packed(out, packed)
    increment_versions([out])


def squared_norms(grads: Sequence[Array] | Array, *, layout: Sequence[int] | Array | None = None) -> Array:
    """Squared Euclidean norms, float64 [num_tensors], of arrays or of the slices of a packed buffer.

    NaN or Inf exactly where the data holds one (or, in float64, a value above 1e154).
    Bit-identical for every number of threads.
    """
    if isinstance(grads, (list, tuple)):
        if layout is not None:
            raise TypeError("layout: only a packed buffer takes one, grads is a list")
        first = grads[0] if grads else None
        return like(first, _serving(first)[0].squared_norms(list(grads), None))
    check_packed_kind("grads", grads, None)
    if layout is None:
        raise TypeError("layout: a packed buffer needs the sizes of its slices")
    return like(grads, _serving(grads)[0].squared_norms(grads, whole_layout(layout, None)))


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
        skip_nonfinite: where any gradient holds a NaN or infinity, params and momenta stay as they are, and
            param_norms_after are the norms before.
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
    is_adapted = _default_adapt(params) if adapt is None else flags("adapt", adapt, num_tensors)
    like_array = params[0] if params else None
    serving, place = _serving(like_array)
    measured = serving.lars_update(
        params,
        momenta,
        _update_grads(params, momenta, grads, layout),
        hyper=hyper,
        adapt=is_adapted,
        nesterov=flag("nesterov", nesterov),
        param_norms=_known_norms("param_norms", param_norms, num_tensors, place),
        grad_norms=_known_norms("grad_norms", grad_norms, num_tensors, place),
        skip_nonfinite=flag("skip_nonfinite", skip_nonfinite),
    )
    increment_versions(params)
    return LarsNorms(like(like_array, measured[0]), like(like_array, measured[1]))


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
    like_array = params[0] if params else None
    norms = _serving(like_array)[0].sgd_update(
        params,
        momenta,
        _update_grads(params, momenta, grads, layout),
        hyper=hyper,
        nesterov=flag("nesterov", nesterov),
        skip_nonfinite=flag("skip_nonfinite", skip_nonfinite),
    )
    increment_versions(params)
    return like(like_array, norms)


def _bandit_vectors(
    probabilities: Any, drawn_probabilities: Any, squared_norms: Any, active: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The vectors of `update_probabilities` on the host, checked."""
    p = vector("probabilities", probabilities)
    check_range("probabilities", p, SMALLEST_PROBABILITY, 1.0)
    drawn = vector("drawn_probabilities", drawn_probabilities, p.size)
    check_range("drawn_probabilities", drawn, SMALLEST_PROBABILITY, 1.0)
    n2 = vector("squared_norms", squared_norms, p.size)
    is_active = flags("active", active, p.size)
    check_range("squared_norms", n2[is_active], 0.0, np.inf)
    return p, drawn, n2, is_active


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
    if (known < 0).any() or np.isinf(known).any():
        raise ValueError(f"{name}: norms are finite and at least 0 (NaN: measure)")
    return known if place is None else device_vector(name, known, place)


def _number(name: str, value: Any, low: float) -> float:
    return float(per_tensor(name, value, 1, low=low)[0])


def _feasible(budget: Any, p_min: Any, num_layers: int) -> tuple[float, float]:
    """Checks 0 < p_min <= budget / num_layers <= 1 up to rounding."""
    budget, p_min = _number("budget", budget, 0.0), _number("p_min", p_min, 0.0)
    tolerance = 1e-9 * max(1.0, budget)
    if not 0.0 < p_min <= 1.0:
        raise ValueError(f"p_min: {p_min} is not in (0, 1]")
    if budget > num_layers + tolerance:
        raise ValueError(f"budget: {budget} of {num_layers} layers is more than all of them")
    if budget < p_min * num_layers - tolerance:
        raise ValueError(f"budget: {budget} is less than p_min * num_layers = {p_min * num_layers}")
    return budget, p_min


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    return str(value)
