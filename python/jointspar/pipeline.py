"""One JointSpar iteration: values go from stage to stage, and only what the next iteration needs stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from jointspar import backends, ops
from jointspar.comm.hashing import stable_hash
from jointspar.comm.header import Agreement
from jointspar.comm.heads import Op
from jointspar.comm.transport import Transport
from jointspar.device_arrays import Reading
from jointspar.errors import JointSparError
from jointspar.gradient_exchange import Exchanged, GradientExchange
from jointspar.hyperparameters import HyperParameters
from jointspar.learning import Lesson
from jointspar.step.active_backward import ActiveBackward
from jointspar.step.exchange import Chooser, CustomExchange
from jointspar.step.layers import Layers
from jointspar.step.packing import Packer
from jointspar.step.probabilities import LayerDistribution
from jointspar.step.sampling import Sampling, draw_layers, probabilities_to_draw
from jointspar.step.update import LarsUpdate, SgdUpdate, clip_packed, slice_norms
from jointspar.telemetry import Stats

MAX_SKIPPED_IN_A_ROW = 50
_BUCKET_BYTES = 4 * 2**20  # of what is exchanged at a time during backward
_MAX_STEPS = 2**32  # the step is 32 bits of the counter that random numbers are made from


class Pipeline:
    """The stages of an optimizer's iteration with what they carry from one to the next.

    Construction and the methods that exchange, draw or load are collective. See `JointSparLARS` for the arguments.
    """

    def __init__(
        self,
        layers: Layers,
        sampling: Sampling,
        comm: Transport,
        *,
        optimizer_name: str,
        inactive: str,
        wire_dtype: torch.dtype | str | None,
        exchange: str | CustomExchange,
        check_every: int,
        overlap: bool,
    ) -> None:
        self.layers, self.sampling, self.comm = layers, sampling, comm
        self.packer = Packer(layers.parameters, layers.names, wire_dtype, _BUCKET_BYTES if overlap else None)
        is_partial = sampling.strategy != "shared"
        self.chooser = Chooser(
            exchange, comm, self.packer.wire_dtype, is_partial=is_partial, device=layers.parameters[0].device
        )
        self._decays_idle = inactive == "decay"
        self._check_every = check_every
        settings: dict[str, Any] = {"optimizer": optimizer_name, "inactive": inactive}
        settings["exchange"] = exchange if isinstance(exchange, str) else exchange.agreed()
        settings["check_every"], settings["overlap"] = check_every, overlap
        settings["device"] = layers.parameters[0].device.type
        settings["backend"] = backends.name_of(ops.backend())  # of host arrays; each rounds in its own way
        settings["eager_bytes"] = comm.eager_bytes  # ranks cut messages by it
        self.agreement = self._agree(settings)
        self.backward = ActiveBackward(layers.parameters)
        self.distribution = LayerDistribution(sampling, layers.num_layers, self._eligible_layers(), comm.world_size)
        self.active = np.zeros(layers.num_layers, dtype=bool)
        self.drawn = self.distribution.probabilities  # float64 [num_layers], what `active` was drawn from
        self.step_count = 0
        self.skipped_in_a_row = 0
        self.flops: np.ndarray | None = None  # int64 [num_layers], of weight gradients
        self._is_drawn = False  # whether the next iteration's layers are drawn, told to the others and set, all of it
        self._lesson: Lesson | None = None  # with lag=1, of the step before: it is read when it has long arrived
        self.exchange = GradientExchange(
            layers, sampling, comm, self.agreement, self.backward, self.packer, self.chooser, overlap=overlap
        )
        self.chooser.prepare(self.packer.dense_bytes(np.ones(len(layers.parameters), dtype=bool)))
        self.draw_next()

    @property
    def stats(self) -> Stats:
        return self.exchange.stats

    @stats.setter
    def stats(self, stats: Stats) -> None:
        self.exchange.stats = stats

    def exchange_gradients(
        self,
        hyper: HyperParameters,
        *,
        grad_scale: float,
        found_inf: float,
        max_norm: float | None,
        is_looked_at: bool = False,
    ) -> Exchanged:
        """Stages 3 and 4: pack this rank's gradients, agree with the other ranks, sum, and clip the sum.

        grad_scale: what the gradients were multiplied by (GradScaler). found_inf: not 0 skips the step on all ranks.
        is_looked_at: the user sees the mean gradient before the update.
        """
        hyper.refresh()
        exchanged = self.exchange.run(
            self._lesson, [hyper.agreed(), max_norm], grad_scale=grad_scale, found_inf=found_inf
        )
        if exchanged.is_finite and (not self.sampling.lag or is_looked_at or max_norm is not None):
            with self.stats.phase("measure"):
                self._measure(exchanged, max_norm)
        return exchanged

    def agree_on_changes(self, exchanged: Exchanged, hyper: HyperParameters) -> None:
        """After the user may have changed mean_grad: measure it, and skip it everywhere if anywhere not finite."""
        if exchanged.is_finite:
            exchanged.take_norms(slice_norms(exchanged.mean_grad, exchanged.layout.sizes))
        values = np.append(np.zeros(self.layers.num_layers), float(not exchanged.has_finite_norms()))
        hyper.refresh()
        with self._counting_bytes():
            gathered = self.agreement.go(Op.UPDATE, step=self.step_count, agreed=hyper.agreed(), values=values)
        exchanged.is_finite = not gathered[:, -1].any()

    def apply(self, exchanged: Exchanged, update: LarsUpdate | SgdUpdate, hyper: HyperParameters) -> None:
        """Stage 5: weights and momentum, nothing where the mean gradient is not finite.

        With lag=1 the update finds that out by itself, so that nobody waits for norms that a device still computes.
        """
        if not self.sampling.lag:
            exchanged.is_finite = exchanged.has_finite_norms()
        exchanged.lesson.is_finite = exchanged.is_finite
        if not exchanged.is_finite:
            return
        with self.stats.phase("update"):
            positions = exchanged.layout.positions
            idle = self.backward.updatable & self._decays_idle
            idle[positions] = False
            norms = update.apply(
                positions,
                exchanged.mean_grad,
                exchanged.norms,
                hyper,
                idle=np.flatnonzero(idle),
                skip_nonfinite=bool(self.sampling.lag),
            )
            if exchanged.lesson.used is None:  # else they set out before the update, which nobody then waits for
                exchanged.lesson.used = Reading(norms)
            if exchanged.lesson.mean is None:
                exchanged.lesson.mean = self._reading(norms, positions)

    def finish_step(self, exchanged: Exchanged) -> None:
        """Stages 6, 1 and 2: learn, draw the layers of the next step, and count this one.

        With lag=1 the lesson is that of the step before, whose norms have long arrived.
        """
        self._is_drawn = False
        eligible = self.distribution.eligible
        active_fraction = float(self.active[eligible].mean()) if eligible.any() else 1.0
        flops_skipped = None if self.flops is None else int(self.flops[eligible & ~self.active].sum())
        self._follow_frozen()
        lesson = self._lesson if self.sampling.lag else exchanged.lesson
        is_applied = lesson is None or lesson.was_applied()
        if lesson is not None and is_applied:
            with self.stats.phase("probabilities"):
                lesson.teach(self.distribution, exchanged.gathered)
        self._lesson = exchanged.lesson if self.sampling.lag else None
        self.step_count += 1
        self.skipped_in_a_row = 0 if is_applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise JointSparError(f"{MAX_SKIPPED_IN_A_ROW} steps in a row had NaN or infinite gradients")
        if self._check_every and self.step_count % self._check_every == 0 and self.comm.world_size > 1:
            with self.stats.phase("check"), self._counting_bytes():
                self._check_weights()
        self.draw_next()
        self.stats.add_step(active_fraction=active_fraction, skipped=not is_applied, flops_skipped=flops_skipped)

    def draw_next(self) -> None:
        """Stages 1 and 2 of the coming iteration; its plan travels during the next forward."""
        self._is_drawn = False
        with self.stats.phase("sample"):
            self.drawn = probabilities_to_draw(self.distribution.probabilities, self.sampling, self.step_count)
            self.active = draw_layers(
                self.drawn,
                self.sampling,
                sizes=self.layers.sizes,
                step=self.step_count,
                rank=self.comm.rank,
                world_size=self.comm.world_size,
            )
            self.backward.activate(self.layers.wanted_parameters(self.active))
        self.exchange.start(self.step_count, self.active, self.drawn, self.distribution.probabilities.copy())
        alike = {"independent": [], "stratified": [self.drawn], "shared": [self.drawn, self.active]}
        with self._counting_bytes():
            self.agreement.post_plan(self.step_count, self.active, alike[self.sampling.strategy])
        self._is_drawn = True

    def draw_what_was_left(self) -> None:
        """After an exception from outside (KeyboardInterrupt, a signal handler's) that may have left `draw_next`."""
        if not self._is_drawn and not self.agreement.is_over:
            self.backward.reread_flags()
            self.draw_next()

    @property
    def is_rank_local(self) -> bool:
        """Whether each rank has a state of its own, so that as many ranks must continue from it."""
        return self.sampling.strategy == "independent" or self.chooser.is_rank_local

    def state_dict(self) -> dict[str, Any]:
        """Rank-local state beside weights and momentum."""
        arrays = self.distribution.state_dict()
        return {
            "step": self.step_count,
            "skipped_in_a_row": self.skipped_in_a_row,
            "trainable": torch.from_numpy(self.backward.trainable.copy()),
            "trainable_before": torch.from_numpy(self.backward.trainable_before.copy()),
            "distribution": {
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for name, value in arrays.items()
            },
            "lesson": {} if self._lesson is None else self._lesson.state_dict(),
            "exchange": self.chooser.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other parameters or layers."""
        for flags in (state["trainable"], state.get("trainable_before", state["trainable"])):
            if np.shape(flags) != (len(self.layers.parameters),):
                raise ValueError(f"state_dict: is of {np.size(flags)} parameters, not {len(self.layers.parameters)}")
        if not 0 <= int(state["step"]) < _MAX_STEPS or int(state["skipped_in_a_row"]) < 0:
            raise ValueError(f"state_dict: no run has made {int(state['step'])} steps")
        self.distribution.check_state(state["distribution"])
        self.chooser.check_state(state["exchange"])
        if state["lesson"] and not Lesson.from_state(state["lesson"]).is_of(self.layers.num_layers):
            raise ValueError(f"state_dict: its lesson is not of {self.layers.num_layers} layers")

    def load_state_dict(self, state: dict[str, Any], also_agreed: Sequence[torch.Tensor] = ()) -> None:
        """Continue from `state_dict`, once `check_state` has passed it. Collective: plans the step again.

        also_agreed: what else must be the same on all ranks now.
        """
        self.backward.check_owner()
        self.put(state)
        lesson = Lesson.from_state(state["lesson"]) if state["lesson"] and self.sampling.lag else None
        self._lesson = lesson if lesson is not None and lesson.world_size == self.comm.world_size else None
        self.chooser.load_state_dict(state["exchange"])
        self.agreement.go(Op.LOAD, step=self.step_count, agreed=[self.chooser.agreed(), *also_agreed])
        self._draw_again(state)

    def _draw_again(self, state: dict[str, Any]) -> None:
        """The layers of the step that a state was saved before. What was frozen or thawed since then acts after it."""
        trainable = self.backward.trainable.copy()
        self.backward.trainable[:] = np.asarray(state.get("trainable_before", trainable))  # earlier states have none
        self.backward.reread_flags()
        self._follow_frozen()
        self.draw_next()
        self.backward.trainable[:] = trainable

    def put(self, state: dict[str, Any]) -> None:
        """That part of a state that meets nobody: where training is, what was learned, and what is trained."""
        self.distribution.load_state_dict(state["distribution"])
        self.backward.trainable[:] = np.asarray(state["trainable"])
        self.backward.trainable_before[:] = np.asarray(state.get("trainable_before", state["trainable"]))
        self.step_count = int(state["step"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])

    def _follow_frozen(self) -> None:
        """Take layers that the user froze out of the distribution, and thawed ones in."""
        eligible = self._eligible_layers()
        if (eligible != self.distribution.eligible).any():
            self.distribution.set_eligible(eligible)

    @contextmanager
    def _counting_bytes(self) -> Iterator[None]:
        """Headers beside those of the exchange."""
        sent_before = self.comm.bytes_sent
        yield
        self.stats.sent_bytes += self.comm.bytes_sent - sent_before

    def _check_weights(self) -> None:
        """Raises DesyncError on all ranks where a layer's weights are not the same bits on all of them."""
        parameters, sampled = self.layers.parameters, self.layers.sampled
        by_layer = [stable_hash([parameters[index] for index in layer.parameters]) for layer in sampled]
        inside = {index for layer in sampled for index in layer.parameters}
        by_layer.append(stable_hash([parameters[index] for index in range(len(parameters)) if index not in inside]))
        self.agreement.compare_digests(self.step_count, np.array(by_layer, dtype=np.int64))

    def _measure(self, exchanged: Exchanged, max_norm: float | None) -> None:
        norms = slice_norms(exchanged.mean_grad, exchanged.layout.sizes)
        exchanged.lesson.mean = self._reading(norms, exchanged.layout.positions)
        exchanged.take_norms(norms if max_norm is None else clip_packed(exchanged.mean_grad, norms, max_norm))

    def _reading(self, norms: torch.Tensor, positions: np.ndarray) -> Reading:
        """Squared norms by layer, of norms of slices."""
        return Reading(norms, lambda values: self.layers.sum_by_layer(np.square(values), positions))

    def _agree(self, settings: dict[str, Any]) -> Agreement:
        """Compare layout and settings with the other ranks. Raises DesyncError on all of them where any differ."""
        described = self.layers.describe()
        num_layers = self.layers.num_layers
        return Agreement(
            self.comm,
            layer_names=[layer.name for layer in self.layers.sampled],
            layer_hashes=[stable_hash(item) for item in described[:num_layers]],
            always_active_hash=stable_hash(described[num_layers:]),
            settings=asdict(self.sampling) | settings | {"wire_dtype": str(self.packer.wire_dtype)},
            num_values=num_layers + 1,  # squared norms, and GradScaler's found_inf
        )

    def _eligible_layers(self) -> np.ndarray:
        """bool [num_layers]: layers with a tensor that the user wants trained."""
        return self.layers.with_any(self.backward.trainable)
