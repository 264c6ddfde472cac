"""JointSparLARS and JointSparSGD: torch optimizers that hand values from stage to stage of one JointSpar step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from jointspar import comm as comm_module
from jointspar.comm.hashing import stable_hash
from jointspar.comm.header import Agreement, Op
from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError
from jointspar.replicas import broadcast_parameters
from jointspar.step.active_backward import ActiveBackward
from jointspar.step.exchange.choose import choose
from jointspar.step.layers import Layer, group_layers, named_groups
from jointspar.step.packing import PackedLayout, Packer, gradient_scales
from jointspar.step.probabilities import LayerDistribution, observed_norms
from jointspar.step.sampling import Sampling, draw_layers
from jointspar.step.update import HyperParameters, LarsUpdate, SgdUpdate, clip_packed, slice_norms
from jointspar.telemetry import Stats

INACTIVE = ("skip", "decay")
MAX_SKIPPED_IN_A_ROW = 50


@dataclass
class _Exchanged:
    """One step's gradient between `synchronize` and the update."""

    layout: PackedLayout
    mean_grad: torch.Tensor  # packed
    norms: np.ndarray  # float64 [num_slices] of mean_grad
    local_squared_norms: np.ndarray  # float64 [num_layers]
    gathered_squared_norms: np.ndarray  # float64 [world_size, num_layers]
    counts: np.ndarray  # int64 [num_layers], ranks that computed each layer
    is_finite: bool

    def measure(self) -> None:
        """Read the norms of mean_grad; not finite on every rank alike, since all hold the same sum."""
        if self.is_finite:
            self.norms = slice_norms(self.mean_grad, self.layout.sizes)
            self.is_finite = bool(np.isfinite(self.norms).all())


class _JointSparOptimizer(torch.optim.Optimizer):
    """The pipeline that both optimizers share; they differ in their hyperparameters and update."""

    _step_supports_amp_scaling = True
    _hyper_names: tuple[str, ...]
    _update_type: type[LarsUpdate] | type[SgdUpdate]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        inactive: str,
        sampling: Sampling | None,
        comm: Transport | None,
        wire_dtype: torch.dtype | str | None,
        exchange: str,
    ) -> None:
        if inactive not in INACTIVE:
            raise ValueError(f"inactive: {inactive!r} is not one of {', '.join(INACTIVE)}")
        groups, named = named_groups(params)
        self.sampling = sampling if sampling is not None else Sampling()
        self._layers = group_layers(named, self.sampling.grouping)
        self.sampling.constraints(self._layers.num_layers)
        self._is_built = False
        super().__init__(groups, defaults)
        self._is_built = True
        self._hyper = HyperParameters(self.param_groups, self._layers.parameters, self._hyper_names)
        self._hyper.check()
        self._inactive = inactive
        self.comm = comm if comm is not None else comm_module.world()
        self._packer = Packer(self._layers.parameters, self._layers.names, wire_dtype)
        self._exchange = choose(exchange, self.comm, self._packer.wire_dtype)
        self._agreement = self._agree(exchange)
        broadcast_parameters(self.comm, self._layers.parameters)
        self._make_state()
        self._draw_next(self._distribution.probabilities)

    def _agree(self, exchange: str) -> Agreement:
        """Compare layout and settings with the other ranks. Raises DesyncError on all of them where any differ."""
        described = self._layers.describe()
        num_layers = self._layers.num_layers
        settings = asdict(self.sampling) | {
            "optimizer": type(self).__name__,
            "inactive": self._inactive,
            "wire_dtype": str(self._packer.wire_dtype),
            "exchange": exchange,
        }
        return Agreement(
            self.comm,
            layer_names=[layer.name for layer in self._layers.sampled],
            layer_hashes=[stable_hash(item) for item in described[:num_layers]],
            always_active_hash=stable_hash(described[num_layers:]),
            settings=settings,
            num_values=num_layers + 1,  # squared norms, and GradScaler's found_inf
        )

    def _make_state(self) -> None:
        parameters = self._layers.parameters
        self._momenta = []
        for parameter in parameters:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            self._momenta.append(torch.zeros_like(parameter, dtype=dtype, requires_grad=False))
            self.state[parameter]["momentum_buffer"] = self._momenta[-1]
        self._update = self._update_type(parameters, self._momenta)
        self._backward = ActiveBackward(parameters)
        self._distribution = LayerDistribution(self.sampling, self._layers.num_layers, self._eligible_layers())
        self._active = np.zeros(self._layers.num_layers, dtype=bool)
        self._step_count = 0
        self._skipped_in_a_row = 0
        self._exchanged: _Exchanged | None = None
        self._mean_grads_shown = False
        self.stats = Stats()

    # What users look at ------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The sampled layers, in the order of `active` and `probabilities`."""
        return self._layers.sampled

    @property
    def active(self) -> torch.Tensor:
        """bool [num_layers]: the layers that this rank computes in the step under way."""
        return torch.from_numpy(self._active.copy())

    @property
    def probabilities(self) -> torch.Tensor:
        """float64 [num_layers]: of the next draw (rank-local with strategy="independent"); 0 for frozen layers."""
        return torch.from_numpy(self._distribution.probabilities.copy())

    @property
    def mean_grads(self) -> Mapping[str, torch.Tensor]:
        """The exchanged gradients by parameter name, between `synchronize()` and `step()`.

        Views of the packed buffer, in its dtype: writing them changes what `step()` applies. Layers that no rank
        computed are absent.
        """
        if self._exchanged is None:
            raise JointSparError("mean_grads exist between synchronize() and step()")
        self._mean_grads_shown = True
        return self._packer.unpack_views(self._exchanged.layout, self._exchanged.mean_grad)

    # One iteration -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """Exchange the gradients of active layers, update, and draw the layers of the next iteration.

        Collective: every rank calls it equally often. `.grad` stays as backward left it. A step whose mean gradient
        holds a NaN or infinity is skipped on all ranks alike; 50 of those in a row raise JointSparError.

        Args:
            closure: evaluated once, before the exchange; its result is returned.
            max_norm: clip the mean gradient to this total norm.

        Raises: DesyncError where ranks disagree, CollectiveTimeout where one does not come.
        """
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm: {max_norm} is not above 0")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._exchanged is None:
            self._exchange_gradients(max_norm)
        elif self._mean_grads_shown:
            self._exchanged.measure()
        exchanged, self._exchanged, self._mean_grads_shown = self._exchanged, None, False
        assert exchanged is not None
        lagged = self._distribution.probabilities.copy()
        if exchanged.is_finite:
            self._apply(exchanged, max_norm)
        self._finish_step(exchanged, lagged)
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange the gradients now, so that `mean_grads` can be looked at or changed before `step()`.

        Collective. With a GradScaler call its `unscale_` first.
        """
        if self._exchanged is not None:
            raise JointSparError("synchronize() was called twice without a step() between")
        self._exchange_gradients(None)

    def release(self) -> None:
        """Give `requires_grad` of all parameters back as it was found (or as the user set it since)."""
        self._backward.release()

    def set_trainable(self, parameters: Iterable[torch.Tensor], trainable: bool) -> None:
        """Freeze or thaw parameters in mid-training, on all ranks alike; acts from the next step on.

        Setting `requires_grad` directly is honoured too where it is visible: a layer that is inactive at that
        moment has the flag off already.
        """
        position_of = {id(parameter): position for position, parameter in enumerate(self._layers.parameters)}
        chosen = list(parameters)
        if any(id(parameter) not in position_of for parameter in chosen):
            raise ValueError("parameters: not all of them belong to this optimizer")
        self._backward.set_trainable([position_of[id(parameter)] for parameter in chosen], trainable)

    def meet(self, op: Op, detail: int = 0) -> None:
        """Wait for all ranks to come to `op` in this step. Raises DesyncError where one does something else."""
        self._agreement.go(op, step=self._step_count, hyper_hash=detail)

    def finish(self) -> None:
        """Agree with all ranks that training is over. Collective; runs at exit where it was not called."""
        self._agreement.finish()

    def _exchange_gradients(self, max_norm: float | None) -> None:
        """Pack, agree, exchange: sets `_exchanged`."""
        stats, layers = self.stats, self._layers
        self._backward.observe()
        with stats.phase("plan"):
            plan = self._agreement.wait_plan()
        counts = plan.sum(axis=0)
        trainable = self._backward.trainable
        layout = self._packer.layout(layers.wanted_parameters(counts > 0) & trainable)
        with stats.phase("pack"):
            grad_scale = _as_float(getattr(self, "grad_scale", None), 1.0)
            scales = gradient_scales(
                self.sampling.strategy, self._distribution.drawn_probabilities, counts, self.comm.world_size
            )
            per_parameter = np.append(scales, 1.0 / self.comm.world_size)[layers.layer_of] / grad_scale
            computed = layers.wanted_parameters(self._active)
            packed, squared_norms = self._packer.pack(layout, computed, per_parameter)
            squared_norms /= grad_scale**2
            local = layers.sum_by_layer(squared_norms, layout.positions)
        sent_before = self.comm.bytes_sent
        with stats.phase("go"):
            found_inf = _as_float(getattr(self, "found_inf", None), 0.0)
            gathered = self._agreement.go(
                Op.EXCHANGE,
                step=self._step_count,
                count=layout.total,
                dtype=packed.dtype,
                hyper_hash=stable_hash([self._hyper.table(), max_norm, trainable]),
                values=np.append(local, found_inf),
            )
        no_norms = np.full(layout.sizes.size, np.nan)
        exchanged = _Exchanged(layout, packed, no_norms, local, gathered[:, :-1], counts, not gathered[:, -1].any())
        payload_before = self.comm.bytes_sent
        with stats.phase("exchange"):
            if exchanged.is_finite:
                self._exchange(self.comm, packed, what=f"step {self._step_count} exchange")
        payload = self.comm.bytes_sent - payload_before
        with stats.phase("measure"):
            exchanged.measure()
        stats.sent_bytes = self.comm.bytes_sent - sent_before
        stats.dense_bytes = payload * self._packer.dense_bytes // max(1, layout.total * packed.element_size())
        self._exchanged = exchanged

    def _apply(self, exchanged: _Exchanged, max_norm: float | None) -> None:
        """Update weights and probabilities."""
        layout, norms = exchanged.layout, exchanged.norms
        observed_mean = self._layers.sum_by_layer(np.square(norms), layout.positions)
        with self.stats.phase("update"):
            if max_norm is not None:
                norms = clip_packed(exchanged.mean_grad, norms, max_norm)
            nesterov = bool(self.defaults["nesterov"])
            self._update.apply(layout.positions, exchanged.mean_grad, norms, self._hyper, nesterov)
            if self._inactive == "decay":
                idle = self._backward.trainable.copy()
                idle[layout.positions] = False
                self._update.apply(np.flatnonzero(idle), None, None, self._hyper, nesterov)
        with self.stats.phase("probabilities"):
            squared_norms, observed = observed_norms(
                self.sampling.strategy,
                active=self._active,
                counts=exchanged.counts,
                local=exchanged.local_squared_norms,
                gathered=exchanged.gathered_squared_norms,
                mean_grad=observed_mean,
                drawn_probabilities=self._distribution.drawn_probabilities,
            )
            self._distribution.update(squared_norms, observed)

    def _finish_step(self, exchanged: _Exchanged, lagged: np.ndarray) -> None:
        """Draw the layers of the next step and count this one."""
        active_fraction = float(self._active.mean())
        self._step_count += 1
        self._skipped_in_a_row = 0 if exchanged.is_finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise JointSparError(f"{MAX_SKIPPED_IN_A_ROW} steps in a row had NaN or infinite gradients")
        self._draw_next(lagged)
        self.stats.add_step(active_fraction=active_fraction, skipped=not exchanged.is_finite)

    def _draw_next(self, lagged: np.ndarray) -> None:
        """Stages 1 and 2 of the coming iteration; its plan travels during the next forward."""
        eligible = self._eligible_layers()
        if (eligible != self._distribution.eligible).any():
            self._distribution.set_eligible(eligible)
        with self.stats.phase("sample"):
            drawn = self._distribution.draw_from(lagged)
            self._active = draw_layers(
                drawn, self.sampling, step=self._step_count, rank=self.comm.rank, world_size=self.comm.world_size
            )
            self._backward.activate(self._layers.wanted_parameters(self._active))
        shared = None if self.sampling.strategy == "independent" else stable_hash(drawn)
        sent_before = self.comm.bytes_sent
        self._agreement.post_plan(self._step_count, self._active, shared)
        self.stats.sent_bytes += self.comm.bytes_sent - sent_before

    def _eligible_layers(self) -> np.ndarray:
        """bool [num_layers]: layers with a tensor that the user wants trained."""
        trainable = self._backward.trainable
        return np.array([trainable[list(layer.parameters)].any() for layer in self._layers.sampled], dtype=bool)

    # State -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameter groups are fixed at construction: the ranks agreed on the layers then."""
        if self._is_built:
            raise JointSparError("parameters cannot be added later: build a new optimizer")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's, with what JointSpar adds under "jointspar".

        Rank-local: with strategy="independent" every rank has its own probabilities.
        """
        state = super().state_dict()
        arrays = self._distribution.state_dict()
        state["jointspar"] = {
            "step": self._step_count,
            "skipped_in_a_row": self._skipped_in_a_row,
            "trainable": torch.from_numpy(self._backward.trainable.copy()),
            "distribution": {
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for name, value in arrays.items()
            },
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, exactly. Collective: every rank loads its own.

        Raises ValueError for a state of other parameters or layers; nothing was changed then.
        """
        own = state_dict.get("jointspar")
        if own is None:
            raise ValueError("state_dict: has no 'jointspar' entry, so it is not of this optimizer")
        if len(own["trainable"]) != len(self._layers.parameters):
            raise ValueError(f"state_dict: is of {len(own['trainable'])} parameters, not {len(self._layers.parameters)}")
        self._distribution.check_state(own["distribution"])
        momenta = [state_dict["state"][index]["momentum_buffer"] for index in range(len(self._momenta))]
        super().load_state_dict(state_dict)
        for parameter, momentum, loaded in zip(self._layers.parameters, self._momenta, momenta, strict=True):
            momentum.copy_(loaded)
            self.state[parameter]["momentum_buffer"] = momentum
        self._hyper = HyperParameters(self.param_groups, self._layers.parameters, self._hyper_names)
        self._update = self._update_type(self._layers.parameters, self._momenta)
        self._distribution.load_state_dict(own["distribution"])
        self._backward.set_trainable(range(len(momenta)), np.asarray(own["trainable"]))
        self._step_count = int(own["step"])
        self._skipped_in_a_row = int(own["skipped_in_a_row"])
        self._exchanged = None
        self.meet(Op.LOAD)
        self._draw_next(self._distribution.drawn_probabilities)


class JointSparLARS(_JointSparOptimizer):
    """JointSpar with layer-wise adaptive rate scaling: computes, sends and applies gradients of sampled layers only.

    The expected exchanged gradient `mean_grad` is the dense mean gradient. LARS normalises by its norm, so the
    expected *step* is not the dense LARS step (with strategy="shared" the 1/p scale cancels altogether: the effective
    rate of a layer is p * lr). With budget=1.0, one rank and wire_dtype=None it is LARS, bit for bit.

    Collective: every rank builds it with the same arguments; rank 0's weights go to all ranks. Toggles
    requires_grad of the parameters until `release()`. Kernels write parameters in place.

    Args:
        params: `model.named_parameters()`, tensors, or parameter groups of either. Layers may span groups.
            float32, float64, bfloat16 or float16 on the CPU; momentum is kept in float32 (float64 for float64).
        lr, momentum, weight_decay, trust_coefficient, eps, nesterov: see `jointspar.ops.lars_update`; all but
            nesterov may differ by group.
        adapt_vectors: also adapt and decay tensors of one dimension (biases, normalisation); per group.
        inactive: a layer that no rank computed is left alone ("skip"), or momentum and weight decay go on ("decay").
        sampling: see `Sampling`.
        comm: transport of the ranks; default `jointspar.comm.world()`.
        wire_dtype: dtype of the exchanged buffer; default float32 (float64 when a parameter is float64).
        exchange: "allreduce" (the MPI library's), "ring" (own, any dtype) or "auto".

    Raises: ValueError or TypeError for arguments out of range, DesyncError where ranks were given different ones.
    Source: Liu & Mozafari 2022, Algorithm 2 (JointSpar-LARS); You, Gitman & Ginsburg 2017.
    """

    _hyper_names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
    _update_type = LarsUpdate

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        adapt_vectors: bool = False,
        inactive: str = "skip",
        sampling: Sampling | None = None,
        comm: Transport | None = None,
        wire_dtype: torch.dtype | str | None = None,
        exchange: str = "auto",
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps,
            nesterov=nesterov, adapt_vectors=adapt_vectors,
        )  # fmt: skip
        super().__init__(
            params, defaults, inactive=inactive, sampling=sampling, comm=comm, wire_dtype=wire_dtype, exchange=exchange
        )


class JointSparSGD(_JointSparOptimizer):
    """JointSpar with SGD, momentum and weight decay as `torch.optim.SGD`: the expected step is the dense step.

    Arguments as `JointSparLARS`. Source: Liu & Mozafari 2022, Algorithm 2 (JointSpar).
    """

    _hyper_names = ("lr", "momentum", "weight_decay")
    _update_type = SgdUpdate

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        inactive: str = "skip",
        sampling: Sampling | None = None,
        comm: Transport | None = None,
        wire_dtype: torch.dtype | str | None = None,
        exchange: str = "auto",
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(
            params, defaults, inactive=inactive, sampling=sampling, comm=comm, wire_dtype=wire_dtype, exchange=exchange
        )


def _as_float(value: Any, default: float) -> float:
    return default if value is None else float(value)
