"""The operations on the arrays of one CUDA device, over compiled kernels (`native`) or run-time compiled ones (`cupy`).

It has the functions of a host backend. Results are device arrays: nothing waits for the device. What a host backend
checks in the values themselves (probabilities in range, finite norms) cannot be looked at here; the contract headers in
csrc/include/jointspar say what the kernels do with such values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jointspar.device_arrays import Array, OrderedWithTorch, Place, empty, named_stream, stream_of


class OnDevice:
    """The operations for arrays at `place`; `kernels` has the functions of jointspar_ext._cuda."""

    def __init__(self, kernels: Any, place: Place, array: Array) -> None:
        stream, is_named = stream_of(place, array), place.library == "torch" and named_stream(array) is not None
        self._kernels = OrderedWithTorch(kernels, place.device, stream) if is_named else kernels
        self._place = place
        self._queue = {"device": place.device, "stream": stream}

    def sample_layers(self, probabilities: Array, **arguments: Any) -> Array:
        active = self._empty(len(probabilities), "bool")
        self._kernels.sample_layers(probabilities, active, **self._queue, **arguments)
        return active

    def project_probabilities(self, log_weights: Array, **arguments: Any) -> Array:
        probabilities = self._empty(len(log_weights))
        self._kernels.project_probabilities(log_weights, probabilities, **self._queue, **arguments)
        return probabilities

    def update_probabilities(
        self,
        probabilities: Array,
        squared_norms: Array,
        active: Array,
        *,
        drawn_probabilities: Array,
        gradient_bound: Array,
        **arguments: Any,
    ) -> tuple[Array, Array]:
        """gradient_bound: float64 [1], updated in place and returned."""
        updated = self._empty(len(probabilities))
        self._kernels.update_probabilities(
            probabilities, squared_norms, active, drawn_probabilities, gradient_bound, updated,
            **self._queue, **arguments,
        )  # fmt: skip
        return updated, gradient_bound

    def pack_gradients(
        self, grads: Sequence[Array | None], scales: np.ndarray, sizes: np.ndarray, packed: Array
    ) -> Array:
        norms = self._empty(len(grads))
        self._kernels.pack_gradients(grads, scales, sizes, packed, norms, **self._queue)
        return norms

    def unpack_gradients(self, packed: Array, outs: Sequence[Array], add: bool) -> None:
        self._kernels.unpack_gradients(packed, outs, add, **self._queue)

    def add_packed(self, out: Array, packed: Array) -> None:
        self._kernels.add_packed(out, packed, **self._queue)

    def squared_norms(self, grads: Sequence[Array] | Array, sizes: np.ndarray | None) -> Array:
        norms = self._empty(len(grads) if sizes is None else sizes.size)
        self._kernels.squared_norms(grads, sizes, norms, **self._queue)
        return norms

    def lars_update(
        self,
        params: Sequence[Array],
        momenta: Sequence[Array],
        grads: Sequence[Array | None] | Array,
        *,
        param_norms: Array | None,
        grad_norms: Array | None,
        **arguments: Any,
    ) -> tuple[Array, Array]:
        used, after = self._empty(len(params)), self._empty(len(params))
        self._kernels.lars_update(
            params, momenta, grads, param_norms=param_norms, grad_norms=grad_norms, used_grad_norms=used,
            param_norms_after=after, **self._queue, **arguments,
        )  # fmt: skip
        return used, after

    def sgd_update(
        self, params: Sequence[Array], momenta: Sequence[Array], grads: Sequence[Array | None] | Array, **arguments: Any
    ) -> Array:
        norms = self._empty(len(params))
        self._kernels.sgd_update(params, momenta, grads, grad_norms=norms, **self._queue, **arguments)
        return norms

    def _empty(self, size: int, dtype: str = "float64") -> Array:
        return empty(self._place, size, dtype)
