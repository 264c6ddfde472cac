"""Stage 2: the backward pass computes weight gradients of active layers only, by toggling requires_grad."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

import numpy as np
import torch
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from jointspar.arguments import on_plain_tensors
from jointspar.errors import JointSparError, warn_user

_owners = WeakIdKeyDictionary()  # parameter -> weak reference to the ActiveBackward that toggles it


class ActiveBackward:
    """Owns requires_grad of an optimizer's parameters from its construction on; `release` gives it back until a step.

    `trainable` (bool [num_parameters]) is what the user wants trained. A flag that differs from what was set here was
    changed by the user: `observe` honours it. A parameter of an inactive layer already has the flag off, so freezing it
    leaves no trace: that is what `set_trainable` is for. An owner that goes away gives the flags back; so does one that
    is followed by another on any of its parameters, and makes no more steps. Reentrant checkpointing is refused at the
    first gradient that it makes: a segment whose input needs no gradient gives its parameters none, active or not.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        owners = (_owners[parameter]() for parameter in parameters if parameter in _owners)
        before = dict.fromkeys(owner for owner in owners if owner is not None)  # each once
        for owner in before:
            owner._warn_of_left_out(parameters)
            owner.release()
        self._is_superseded = False
        self._parameters = parameters
        self.trainable = np.array([parameter.requires_grad for parameter in parameters], dtype=bool)
        self.trainable_before = self.trainable.copy()  # when the iteration under way began
        self._as_set = self.trainable.copy()
        self._as_activated = self.trainable.copy()  # the same, but for what the user and `release` set since
        self._fallback: int | None = None
        self._has_had_grad = np.zeros(len(parameters), dtype=bool)
        self._is_reached = self.trainable.copy()  # whether every loss so far depended on it, as far as is known
        self._note: weakref.WeakMethod[Callable[[int], None]] | None = None
        self._watched: dict[int, RemovableHandle] = {}
        self._warned_of: set[str] = set()
        if not self.trainable.any():
            raise ValueError("params: every parameter has requires_grad=False, nothing to train")
        for owner in before:
            owner._is_superseded = True
        for parameter in parameters:
            _owners[parameter] = weakref.ref(self)
            if parameter.requires_grad:
                _refuse_reentrant_checkpointing(parameter)
        weakref.finalize(self, _give_back, parameters, self.trainable, self._as_set)
        weakref.finalize(self, _remove, self._watched)

    @property
    def updatable(self) -> np.ndarray:
        """bool [num_parameters]: trainable now, and when the iteration under way began."""
        return self.trainable & self.trainable_before

    def check_owner(self) -> None:
        """Raises JointSparError after another was built: each would take what the other sets for the user's wish."""
        if self._is_superseded:
            raise JointSparError("another optimizer was built on these parameters since: only that one can be used")

    def watch(self, note: weakref.WeakMethod[Callable[[int], None]]) -> None:
        """Call note()(position) where a backward has accumulated a parameter's gradient."""
        self._note = note
        self._watch_differentiable()

    def observe(self) -> None:
        """Take over flags that the user changed since `activate`; remember which parameters the loss depends on."""
        self.observe_flags()
        self.observe_grads()

    @on_plain_tensors
    def observe_flags(self) -> None:
        """The first half of `observe`, which may come before the last gradient."""
        self.check_owner()
        found = self._found_flags()
        if (found == self._as_set).all():
            return
        if (found & ~self._as_set & self.trainable_before).any():
            self._warn_once(
                "requires_grad was set on parameters of layers that are inactive in this step: what backward computes "
                "for them is dropped, and no time saved. Freeze and thaw by optimizer.set_trainable"
            )
        self._take_over(found)

    def _found_flags(self) -> np.ndarray:
        return np.array([parameter.requires_grad for parameter in self._parameters], dtype=bool)

    def _take_over(self, found: np.ndarray) -> None:
        changed = found != self._as_set
        if (changed & ~found & self.trainable).any() and (self.trainable & ~self._as_set).any():
            self._warn_once(
                "requires_grad was cleared on parameters, which are frozen from now on; of layers that are inactive in "
                "this step, whose flags are off already, nobody can tell, and they go on training. Freeze and thaw by "
                "optimizer.set_trainable"
            )
        self.trainable[changed] = found[changed]
        self._as_set[:] = found

    @on_plain_tensors
    def observe_grads(self) -> None:
        """The second half, after backward."""
        has_grad = np.array([parameter.grad is not None for parameter in self._parameters], dtype=bool)
        if not has_grad.any():  # no backward in this step
            return
        self._has_had_grad |= has_grad
        self._is_reached &= has_grad | ~(self._as_set & self._as_activated)
        reached = np.flatnonzero(has_grad & self._is_reached)
        self._fallback = int(reached[-1] if reached.size else np.flatnonzero(has_grad)[-1])

    def set_trainable(self, positions: Sequence[int], trainable: bool | np.ndarray) -> None:
        """Freeze or thaw parameters, active or not."""
        self.check_owner()
        self.trainable[list(positions)] = trainable

    @on_plain_tensors
    def activate(self, wanted: np.ndarray) -> None:
        """Let autograd compute the gradients of `wanted` parameters (bool [num_parameters]) and of no others.

        Where nothing is wanted of which a gradient is sure to come (not a head that some losses leave out, nor a layer
        that had none yet), another parameter stays differentiable, so that the user's `loss.backward()` works; its
        gradient is discarded. That is the last trainable one that had a gradient whenever it could; before the first
        backward, when nothing is known of any, the first and the last one: most losses depend on both.
        """
        self.check_owner()
        flags = wanted & self.trainable
        if not (flags & self._is_reached & self._has_had_grad).any() and self.trainable.any():
            is_usable = self._fallback is not None and self.trainable[self._fallback]
            flags[self._fallback if is_usable else np.flatnonzero(self.trainable)[[0, -1]]] = True
        changed = np.flatnonzero(flags != self._as_set)
        for index, flag in zip(changed.tolist(), flags[changed].tolist(), strict=True):
            self._parameters[index].requires_grad = flag
        self._as_set[:] = self._as_activated[:] = flags
        self.trainable_before[:] = self.trainable
        if self._note is not None:
            self._watch_differentiable()

    def reread_flags(self) -> None:
        """Take the flags as they are for set here, whoever set them; the next `activate` changes what it needs to."""
        self._as_set[:] = self._found_flags()

    def release(self) -> None:
        """Give requires_grad back: as it was found, but for what the user changed since. `activate` takes it again."""
        if self._is_superseded:
            return
        _remove(self._watched)
        self._take_over(self._found_flags())
        _give_back(self._parameters, self.trainable, self._as_set)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned_of:
            self._warned_of.add(message)
            warn_user(message)

    def _warn_of_left_out(self, parameters: Sequence[torch.Tensor]) -> None:
        """Before another owner takes `parameters`: all that it could choose by requires_grad may be the active ones."""
        taken = {id(parameter) for parameter in parameters}
        is_left_out = np.array([id(parameter) not in taken for parameter in self._parameters], dtype=bool)
        is_off = self.trainable & ~self._as_set
        if (is_left_out & is_off).any() and not (is_left_out & self._as_set).any():
            warn_user(
                "layers that are inactive under the optimizer before are not among the new one's parameters and will "
                "not train: call its release() before choosing parameters by requires_grad"
            )

    def _watch_differentiable(self) -> None:
        """A parameter takes a hook only while it is differentiable, and keeps it."""
        owner = weakref.ref(self)

        def tell(_: torch.Tensor, position: int) -> None:
            alive = owner()
            note = None if alive is None or alive._note is None else alive._note()
            if note is not None:
                note(position)

        for position in np.flatnonzero(self._as_set).tolist():
            if position not in self._watched:
                hook = partial(tell, position=position)
                self._watched[position] = self._parameters[position].register_post_accumulate_grad_hook(hook)


def _refuse_reentrant_checkpointing(parameter: torch.Tensor) -> None:
    """Look, once, where the parameter's first gradient is made."""

    def look(_: torch.Tensor) -> None:
        handle.remove()
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is CheckpointFunction.backward.__code__:
                raise JointSparError(
                    "torch.utils.checkpoint with use_reentrant=True loses gradients of active layers that stand behind "
                    "inactive ones; pass use_reentrant=False"
                )
            frame = frame.f_back

    handle = parameter.register_post_accumulate_grad_hook(look)


def _remove(hooks: dict[int, RemovableHandle]) -> None:
    for hook in hooks.values():
        hook.remove()
    hooks.clear()


def _give_back(parameters: Sequence[torch.Tensor], trainable: np.ndarray, as_set: np.ndarray) -> None:
    """Restore the flags that are still as they were set; `as_set` is mutated."""
    for index, parameter in enumerate(parameters):
        if parameter.requires_grad == as_set[index]:
            parameter.requires_grad_(bool(trainable[index]))
    as_set[:] = trainable
