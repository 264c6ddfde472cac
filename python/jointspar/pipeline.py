"""One JointSpar iteration: values go from stage to stage, and only what the next iteration needs stays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from jointspar.comm.hashing import stable_hash
from jointspar.comm.header import Agreement, Op
from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError
from jointspar.step.active_backward import ActiveBackward
from jointspar.step.exchange.choose import choose
from jointspar.step.layers import Layers
from jointspar.step.packing import PackedLayout, Packer, gradient_scales
from jointspar.step.probabilities import LayerDistribution, observation_chance, observed_norms
from jointspar.step.sampling import Sampling, draw_layers
from jointspar.step.update import HyperParameters, LarsUpdate, SgdUpdate, clip_packed, slice_norms
from jointspar.telemetry import Stats

MAX_SKIPPED_IN_A_ROW = 50


@dataclass
class Exchanged:
    """One step's gradient between the exchange and the update."""

    layout: PackedLayout
    mean_grad: torch.Tensor  # packed
    norms: np.ndarray  # float64 [num_slices] of mean_grad, as it is now
    squared_norms: np.ndarray  # float64 [num_layers] of mean_grad as it was exchanged
    local_squared_norms: np.ndarray  # float64 [num_layers]
    gathered_squared_norms: np.ndarray  # float64 [world_size, num_layers]
    counts: np.ndarray  # int64 [num_layers], ranks that computed each layer
    is_finite: bool

    def measure(self) -> None:
        """Read the norms of mean_grad; not finite on every rank alike, since all hold the same sum."""
        if self.is_finite:
            self.norms = slice_norms(self.mean_grad, self.layout.sizes)
            self.is_finite = bool(np.isfinite(self.norms).all())

    def clip(self, max_norm: float) -> None:
        """Scale mean_grad to a total norm of at most max_norm."""
        if self.is_finite:
            self.norms = clip_packed(self.mean_grad, self.norms, max_norm)


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
        exchange: str,
    ) -> None:
        self.layers, self.sampling, self.comm = layers, sampling, comm
        self.packer = Packer(layers.parameters, layers.names, wire_dtype)
        self._exchange = choose(exchange, comm, self.packer.wire_dtype)
        self._decays_idle = inactive == "decay"
        settings = {"optimizer": optimizer_name, "inactive": inactive, "exchange": exchange}
        self.agreement = self._agree(settings)
        self.backward = ActiveBackward(layers.parameters)
        self.distribution = LayerDistribution(sampling, layers.num_layers, self._eligible_layers())
        self.active = np.zeros(layers.num_layers, dtype=bool)
        self.step_count = 0
        self.skipped_in_a_row = 0
        self.flops: np.ndarray | None = None  # int64 [num_layers], of weight gradients
        self.stats = Stats()
        self._sent_per_byte = 0.0  # what the last exchange sent for each byte of its buffer
        self.draw_next(self.distribution.probabilities)

    def exchange_gradients(
        self, hyper: HyperParameters, *, grad_scale: float, found_inf: float, max_norm: float | None
    ) -> Exchanged:
        """Stages 3 and 4: pack this rank's gradients, agree with the other ranks, sum, and clip the sum.

        grad_scale: what the gradients were multiplied by (GradScaler). found_inf: not 0 skips the step on all ranks.
        """
        stats = self.stats
        hyper.check()
        stats.phase_ms.clear()
        self.backward.observe()
        with stats.phase("plan"):
            counts = self.agreement.wait_plan().sum(axis=0)
        with stats.phase("pack"):
            layout, packed, local = self._pack(counts, grad_scale)
        sent_before = self.comm.bytes_sent
        with stats.phase("go"):
            gathered = self.agreement.go(
                Op.EXCHANGE,
                step=self.step_count,
                count=layout.total,
                dtype=packed.dtype,
                hyper_hash=stable_hash([hyper.agreed(), max_norm, self.backward.updatable]),
                values=np.append(local, found_inf),
            )
        exchanged = Exchanged(
            layout,
            packed,
            norms=np.full(layout.sizes.size, np.nan),
            squared_norms=np.full(self.layers.num_layers, np.nan),
            local_squared_norms=local,
            gathered_squared_norms=gathered[:, :-1],
            counts=counts,
            is_finite=not gathered[:, -1].any(),
        )
        payload_before = self.comm.bytes_sent
        with stats.phase("exchange"):
            if exchanged.is_finite:
                self._exchange(self.comm, packed, what=f"step {self.step_count} exchange")
        payload = self.comm.bytes_sent - payload_before
        with stats.phase("measure"):
            exchanged.measure()
            exchanged.squared_norms = self.layers.sum_by_layer(np.square(exchanged.norms), layout.positions)
            if max_norm is not None:
                exchanged.clip(max_norm)
        stats.sent_bytes = self.comm.bytes_sent - sent_before
        if payload:
            self._sent_per_byte = payload / (layout.total * packed.element_size())
        stats.dense_bytes = round(self.packer.dense_bytes(self.backward.updatable) * self._sent_per_byte)
        return exchanged

    def agree_on_changes(self, exchanged: Exchanged, hyper: HyperParameters) -> None:
        """After the user may have changed mean_grad: measure it, and skip it everywhere if anywhere not finite."""
        exchanged.measure()
        values = np.append(np.zeros(self.layers.num_layers), float(not exchanged.is_finite))
        hyper.check()
        gathered = self.agreement.go(
            Op.UPDATE, step=self.step_count, hyper_hash=stable_hash(hyper.agreed()), values=values
        )
        exchanged.is_finite = not gathered[:, -1].any()

    def apply(self, exchanged: Exchanged, update: LarsUpdate | SgdUpdate, hyper: HyperParameters) -> None:
        """Stages 5 and 6: weights and momentum, then probabilities; nothing where the mean gradient is not finite."""
        if not exchanged.is_finite:
            return
        layout = exchanged.layout
        with self.stats.phase("update"):
            update.apply(layout.positions, exchanged.mean_grad, exchanged.norms, hyper)
            if self._decays_idle:
                idle = self.backward.updatable
                idle[layout.positions] = False
                update.apply(np.flatnonzero(idle), None, None, hyper)
        with self.stats.phase("probabilities"):
            squared_norms, observed = observed_norms(
                self.sampling.strategy,
                active=self.active,
                counts=exchanged.counts,
                local=exchanged.local_squared_norms,
                gathered=exchanged.gathered_squared_norms,
                mean_grad=exchanged.squared_norms,
                drawn_probabilities=self.distribution.drawn_probabilities,
            )
            chance = observation_chance(
                self.sampling.strategy, self.distribution.drawn_probabilities, self.comm.world_size
            )
            self.distribution.update(squared_norms, observed, chance)

    def finish_step(self, exchanged: Exchanged, lagged: np.ndarray) -> None:
        """Draw the layers of the next step and count this one. `lagged`: the probabilities before its update."""
        eligible = self.distribution.eligible
        active_fraction = float(self.active[eligible].mean()) if eligible.any() else 1.0
        flops_skipped = None if self.flops is None else int(self.flops[eligible & ~self.active].sum())
        self.step_count += 1
        self.skipped_in_a_row = 0 if exchanged.is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise JointSparError(f"{MAX_SKIPPED_IN_A_ROW} steps in a row had NaN or infinite gradients")
        self.draw_next(lagged)
        self.stats.add_step(
            active_fraction=active_fraction, skipped=not exchanged.is_finite, flops_skipped=flops_skipped
        )

    def draw_next(self, lagged: np.ndarray) -> None:
        """Stages 1 and 2 of the coming iteration; its plan travels during the next forward."""
        eligible = self._eligible_layers()
        if (eligible != self.distribution.eligible).any():
            self.distribution.set_eligible(eligible)
        with self.stats.phase("sample"):
            drawn = self.distribution.draw_from(lagged)
            self.active = draw_layers(
                drawn, self.sampling, step=self.step_count, rank=self.comm.rank, world_size=self.comm.world_size
            )
            self.backward.activate(self.layers.wanted_parameters(self.active))
        shared = None if self.sampling.strategy == "independent" else stable_hash(drawn)
        sent_before = self.comm.bytes_sent
        self.agreement.post_plan(self.step_count, self.active, shared)
        self.stats.sent_bytes += self.comm.bytes_sent - sent_before

    def state_dict(self) -> dict[str, Any]:
        """Rank-local state beside weights and momentum."""
        arrays = self.distribution.state_dict()
        return {
            "step": self.step_count,
            "skipped_in_a_row": self.skipped_in_a_row,
            "trainable": torch.from_numpy(self.backward.trainable.copy()),
            "distribution": {
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for name, value in arrays.items()
            },
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other parameters or layers."""
        if len(state["trainable"]) != len(self.layers.parameters):
            raise ValueError(
                f"state_dict: is of {len(state['trainable'])} parameters, not {len(self.layers.parameters)}"
            )
        self.distribution.check_state(state["distribution"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, once `check_state` has passed it. Collective: plans the step again."""
        self.distribution.load_state_dict(state["distribution"])
        self.backward.set_trainable(range(len(self.layers.parameters)), np.asarray(state["trainable"]))
        self.step_count = int(state["step"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self.agreement.go(Op.LOAD, step=self.step_count)
        self.draw_next(self.distribution.drawn_probabilities)

    def _pack(self, counts: np.ndarray, grad_scale: float) -> tuple[PackedLayout, torch.Tensor, np.ndarray]:
        """Layout, packed gradient, and the squared norms of this rank's unscaled gradients by layer."""
        layers = self.layers
        layout = self.packer.layout(layers.wanted_parameters(counts > 0) & self.backward.updatable)
        scales = gradient_scales(
            self.sampling.strategy, self.distribution.drawn_probabilities, counts, self.comm.world_size
        )
        of_parameter = np.append(scales, 1.0 / self.comm.world_size)[layers.layer_of] / grad_scale
        packed, squared_norms = self.packer.pack(layout, layers.wanted_parameters(self.active), of_parameter)
        return layout, packed, layers.sum_by_layer(squared_norms / grad_scale**2, layout.positions)

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
        trainable = self.backward.trainable
        return np.array([trainable[list(layer.parameters)].any() for layer in self.layers.sampled], dtype=bool)
