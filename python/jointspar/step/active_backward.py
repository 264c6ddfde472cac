"""Stage 2: the backward pass computes weight gradients of active layers only, by toggling requires_grad."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class ActiveBackward:
    """Owns requires_grad of an optimizer's parameters between its construction and `release`.

    `trainable` (bool [num_parameters]) is what the user wants trained. A flag that differs from what was set here was
    changed by the user: `observe` honours it. A parameter of an inactive layer already has the flag off, so freezing
    it leaves no trace: that is what `set_trainable` is for.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self.trainable = np.array([parameter.requires_grad for parameter in parameters], dtype=bool)
        self._as_set = self.trainable.copy()
        if not self.trainable.any():
            raise ValueError("params: every parameter has requires_grad=False, nothing to train")

    def observe(self) -> bool:
        """Take over flags that the user changed since `activate`; True where there were any."""
        count = len(self._parameters)
        found = np.fromiter((parameter.requires_grad for parameter in self._parameters), dtype=bool, count=count)
        changed = found != self._as_set
        self.trainable[changed] = found[changed]
        self._as_set = found
        return bool(changed.any())

    def set_trainable(self, positions: Sequence[int], trainable: bool | np.ndarray) -> None:
        """Freeze or thaw parameters, active or not; acts at the next `activate`."""
        self.trainable[list(positions)] = trainable

    def activate(self, wanted: np.ndarray) -> None:
        """Let autograd compute the gradients of `wanted` parameters (bool [num_parameters]) and of no others.

        Where nothing is wanted the last trainable parameter stays differentiable, so that the user's
        `loss.backward()` works; its gradient is discarded.
        """
        flags = wanted & self.trainable
        if not flags.any() and self.trainable.any():
            flags[np.flatnonzero(self.trainable)[-1]] = True
        for index in np.flatnonzero(flags != self._as_set).tolist():
            self._parameters[index].requires_grad_(bool(flags[index]))
        self._as_set = flags

    def release(self) -> None:
        """Give requires_grad back: as it was found, but for what the user changed since."""
        self.observe()
        for parameter, trainable in zip(self._parameters, self.trainable, strict=True):
            parameter.requires_grad_(bool(trainable))
        self._as_set = self.trainable.copy()
