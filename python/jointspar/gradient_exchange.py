"""Stages 3 and 4: from this rank's gradients to the mean gradient of all ranks, after backward or during it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op, Wish
from jointspar.comm.transport import Transport
from jointspar.device_arrays import Reading
from jointspar.early_exchange import EarlyExchange
from jointspar.errors import warn_user
from jointspar.gradient_sum import GradientSum
from jointspar.learning import Lesson
from jointspar.step.active_backward import ActiveBackward
from jointspar.step.exchange import Chooser
from jointspar.step.layers import Layers
from jointspar.step.packing import PackedLayout, Packer, gradient_scales
from jointspar.step.sampling import Sampling
from jointspar.telemetry import Stats


@dataclass
class Exchanged:
    """One step's mean gradient between the exchange and the update."""

    layout: PackedLayout
    mean_grad: torch.Tensor  # packed
    lesson: Lesson
    gathered: np.ndarray  # float64 [world_size, num_layers]: every rank's squared norms of the lesson that is due
    norms: torch.Tensor | None = None  # float64 [num_slices] of mean_grad as it is now; None: the update measures them
    is_finite: bool = True  # as far as the host knows

    def take_norms(self, norms: torch.Tensor) -> None:
        """Norms of mean_grad, float64 [num_slices], which decide on the update; they set out for the host at once."""
        self.norms, self.lesson.used = norms, Reading(norms)

    def has_finite_norms(self) -> bool:
        """Waits for the norms; the same on every rank, since all hold the same sum."""
        used = self.lesson.used
        return self.is_finite and used is not None and bool(np.isfinite(used.wait()).all())


class GradientExchange:
    """Has one step's gradients packed and summed, as the ranks agree on them. overlap: during backward."""

    def __init__(
        self,
        layers: Layers,
        sampling: Sampling,
        comm: Transport,
        agreement: Agreement,
        backward: ActiveBackward,
        packer: Packer,
        chooser: Chooser,
        *,
        overlap: bool,
    ) -> None:
        self._layers, self._sampling, self._comm = layers, sampling, comm
        self._agreement, self._backward, self._packer, self._chooser = agreement, backward, packer, chooser
        self.stats = Stats()
        self._sums: list[GradientSum] = []  # of this step: a second one where the first was void
        self._headers_bytes = 0
        self._has_warned = False
        self.early: EarlyExchange | None = None
        if overlap:
            self.early = EarlyExchange(comm, layers.parameters, self._begin_early, self._agree_early)
            backward.watch(weakref.WeakMethod(self._note))

    def start(self, step: int, active: np.ndarray, drawn: np.ndarray, probabilities: np.ndarray) -> None:
        """A new step: bool [num_layers], what this rank computes; float64 [num_layers], what that was drawn from, and
        the distribution, which is the same but while `dense_steps` last.
        """
        self._step, self._active, self._drawn, self._probabilities = step, active, drawn, probabilities
        if self.early is not None:
            self.early.arm()

    def discard(self) -> None:
        """Forget what `run` returned in this step; the next one exchanges anew, on all ranks alike."""
        if self.early is not None:
            self.early.why_void = "what it had sent was not applied"

    def run(
        self, lesson_before: Lesson | None, hyper_agreed: Sequence[object], *, grad_scale: float, found_inf: float
    ) -> Exchanged:
        """Sum this step's gradients over the ranks.

        lesson_before: of the step before, which is due with lag=1. hyper_agreed: what else must be the same on all
        ranks. grad_scale, found_inf: see `Pipeline.exchange_gradients`.
        """
        stats = self.stats
        self._packer.check_parameters()
        early = self._sum_early(grad_scale)
        total = self._packed(grad_scale) if early is None else early
        world_size, local = self._comm.world_size, self._local_norms(total, grad_scale)
        lesson = Lesson(self._active, self._drawn, self._probabilities, total.counts, world_size, local)
        with stats.phase("go"):
            due = lesson_before if self._sampling.lag else lesson
            values = np.zeros(self._layers.num_layers) if due is None else due.local.wait()
            gathered = self._go(
                Op.EXCHANGE,
                step=self._step,
                count=total.layout.total,
                dtype=total.packed.dtype,
                agreed=[*hyper_agreed, self._backward.updatable, total.exchange_name],
                values=np.append(values, found_inf),
                wish=Wish.EXCHANGE_ANEW if early is None else Wish(0),
            )
        is_finite = not gathered[:, -1].any()
        if is_finite and self._agreement.is_wished(Wish.EXCHANGE_ANEW):
            if early is not None:  # another rank's is void: this one's gradients are in a sum already
                total = self._packed(grad_scale)
            with stats.phase("exchange"):
                for bucket in range(total.num_packed):
                    total.exchange(bucket)
        exchanged = Exchanged(total.layout, total.packed, lesson, gathered[:, :-1], is_finite=is_finite)
        stats.exchange = total.exchange_name
        stats.sent_bytes = self._headers_bytes + sum(each.sent_bytes for each in self._sums)
        dense_bytes = self._packer.dense_bytes(self._backward.updatable)
        stats.dense_bytes = self._chooser.sent_bytes(stats.exchange, dense_bytes)
        return exchanged

    def _packed(self, grad_scale: float) -> GradientSum:
        """Stage 3, after backward."""
        with self.stats.phase("plan"):
            total = self._begin_sum(grad_scale)
        with self.stats.phase("pack"):
            for _ in total.layout.buckets:
                total.pack_next()
        return total

    def _sum_early(self, grad_scale: float) -> GradientSum | None:
        """What backward has exchanged, where that is worth anything."""
        early = self.early
        if early is None:
            self._start_counting()
            self._backward.observe()
            return None
        with self.stats.phase("exchange"):
            total = early.finish()
        self._backward.observe()
        why = early.why_void
        if grad_scale != 1.0:
            why = "a GradScaler unscales gradients after backward"
        elif why is None and (self._backward.updatable != self._updatable_early).any():
            why = "parameters were frozen or thawed after backward"
        if why is None:
            return total
        if not self._has_warned:
            self._has_warned = True
            what = f"overlap=True: what backward of step {self._step} sent was void, and is sent anew"
            warn_user(f"{what}: {why}")
        return None

    def _begin_early(self) -> GradientSum:
        """At the first gradient; stages 3 and 4 are part of backward's time from now on."""
        self._start_counting()
        self._backward.observe_flags()
        self._updatable_early = self._backward.updatable
        return self._begin_sum(grad_scale=1.0)

    def _agree_early(self, total: GradientSum) -> None:
        """Before any bucket travels, since go comes after all of them."""
        self._go(
            Op.OVERLAP,
            step=self._step,
            count=total.layout.total,
            dtype=total.packed.dtype,
            agreed=[self._updatable_early, total.exchange_name],
        )

    def _go(self, op: Op, **named: Any) -> np.ndarray:
        sent_before = self._comm.bytes_sent
        gathered = self._agreement.go(op, **named)
        self._headers_bytes += self._comm.bytes_sent - sent_before
        return gathered

    def _note(self, position: int) -> None:
        """Backward passes after the last step send nothing."""
        if self.early is not None and not self._agreement.is_over:
            self.early.note(position)

    def _start_counting(self) -> None:
        self.stats.phase_ms.clear()
        self._sums.clear()
        self._headers_bytes = 0

    def _begin_sum(self, grad_scale: float) -> GradientSum:
        """What this step will sum, from what each rank plans to compute."""
        layers, plan = self._layers, self._agreement.wait_plan()
        counts = plan.sum(axis=0)
        scales = gradient_scales(self._sampling.strategy, self._drawn, counts, self._comm.world_size)
        total = GradientSum(
            self._packer,
            self._chooser,
            self._comm,
            self._packer.layout(layers.wanted_parameters(plan) & self._backward.updatable),
            step=self._step,
            wanted=layers.wanted_parameters(self._active),
            scales=np.append(scales, 1.0 / self._comm.world_size)[layers.layer_of] / grad_scale,
            counts=counts,
        )
        self._sums.append(total)
        return total

    def _local_norms(self, total: GradientSum, grad_scale: float) -> Reading:
        """Squared norms by layer of this rank's gradients."""
        positions = total.layout.positions
        return Reading(
            total.squared_norms(), lambda values: self._layers.sum_by_layer(values / grad_scale**2, positions)
        )
