"""The pipeline of a JointSpar iteration as a torch optimizer: what JointSparLARS and JointSparSGD share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch

from jointspar import comm as comm_module
from jointspar.arguments import check_kind, one_of, whole_number
from jointspar.comm.heads import Op, Wish
from jointspar.comm.transport import Transport
from jointspar.device_arrays import refuse_capture
from jointspar.errors import JointSparError
from jointspar.gradient_exchange import Exchanged
from jointspar.hyperparameters import HyperParameters
from jointspar.optimizer_state import SavedOptimizer
from jointspar.pipeline import Pipeline
from jointspar.replicas import broadcast_parameters
from jointspar.step.exchange import Costs, CustomExchange
from jointspar.step.layers import Layer, group_layers, named_groups
from jointspar.step.sampling import Sampling
from jointspar.survivors import go_on_without
from jointspar.telemetry import Stats
from jointspar.weight_flops import weight_grad_flops

INACTIVE = ("skip", "decay")
Batch = TypeVar("Batch")
# Collectives, and decisions of the host. The public torch.compiler.disable imports all of dynamo, a second, at once.
_never_compiled: Callable[[Any], Any] = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
_NO_BATCH: Any = object()


class JointSparOptimizer(SavedOptimizer):
    """A subclass names its hyperparameters and its update; see `jointspar.JointSparLARS`."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        inactive: str,
        sampling: Sampling | None,
        comm: Transport | None,
        wire_dtype: torch.dtype | str | None,
        exchange: str | CustomExchange,
        check_every: int,
        overlap: bool,
    ) -> None:
        check_every = whole_number("check_every", check_every, 0, 2**62)
        one_of("inactive", inactive, INACTIVE)
        sampling = sampling if sampling is not None else Sampling()
        check_kind("sampling", sampling, "a jointspar.Sampling", isinstance(sampling, Sampling))
        check_kind("comm", comm, "a transport of jointspar.comm", comm is None or hasattr(comm, "start_headers"))
        is_exchange = isinstance(exchange, str) or (callable(exchange) and hasattr(exchange, "agreed"))
        check_kind("exchange", exchange, "a name or a CustomExchange", is_exchange)
        check_kind("overlap", overlap, "True or False", isinstance(overlap, (bool, np.bool_)))
        if overlap and not isinstance(exchange, str):
            raise ValueError("overlap: an exchange of your own takes all gradients at once; leave one of them out")
        groups, named = named_groups(params)
        layers = group_layers(named, sampling.grouping)
        sampling.constraints(layers.num_layers)
        if overlap and any(parameter.device.type != "cpu" for parameter in layers.parameters):
            raise ValueError("overlap: for parameters in host memory only; leave it out for those on a GPU")
        self._is_built = False
        super().__init__(groups, defaults)
        self._is_built = True
        self._parameters = layers.parameters
        self._hyper = HyperParameters(self.param_groups, self._parameters, self._hyper_names)
        self._momenta = [self._new_momentum(parameter) for parameter in self._parameters]
        self._update = self._update_type(self._parameters, self._momenta)
        self._exchanged: Exchanged | None = None
        self._batches_loop: object = None  # the latest
        self._run = None
        self._make_pipeline = partial(
            Pipeline,
            layers,
            sampling,
            optimizer_name=type(self).__name__,
            inactive=inactive,
            wire_dtype=wire_dtype,
            exchange=exchange,
            check_every=check_every,
            overlap=bool(overlap),
        )
        self._pipeline = self._make_pipeline(comm if comm is not None else comm_module.world())
        broadcast_parameters(self.comm, self._parameters)

    def _new_momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        momentum = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        self.state[parameter]["momentum_buffer"] = momentum
        return momentum

    # What users look at ------------------------------------------------------------------------------------------

    @property
    def comm(self) -> Transport:
        """The transport of the ranks."""
        return self._pipeline.comm

    @property
    def sampling(self) -> Sampling:
        """How layers are drawn."""
        return self._pipeline.sampling

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The sampled layers, in the order of `active` and `probabilities`."""
        return self._pipeline.layers.sampled

    @property
    def active(self) -> torch.Tensor:
        """bool [num_layers]: the layers that this rank computes in the step under way."""
        return torch.from_numpy(self._pipeline.active.copy())

    @property
    def probabilities(self) -> torch.Tensor:
        """float64 [num_layers]: what `active` was drawn from; 0 for frozen layers, 1 while `dense_steps` last.

        Rank-local with strategy="independent".
        """
        return torch.from_numpy(self._pipeline.drawn.copy())

    @property
    def stats(self) -> Stats:
        """Bytes, active layers and times, of the last step and in total."""
        return self._pipeline.stats

    @property
    def exchange_costs(self) -> Costs | None:
        """What exchange="auto" measured at construction, in seconds; None where there was no choice.

        `stats.exchange` says what the last step took.
        """
        return self._pipeline.chooser.costs

    @property
    def mean_grads(self) -> Mapping[str, torch.Tensor]:
        """The exchanged gradients by parameter name, between `synchronize()` and `step()`.

        Views of the packed buffer, in its dtype: writing them changes what `step()` applies. Layers that no rank
        computed are absent.
        """
        if self._exchanged is None:
            raise JointSparError("mean_grads exist between synchronize() and step()")
        return self._pipeline.packer.unpack_views(self._exchanged.layout, self._exchanged.mean_grad)

    # One iteration -----------------------------------------------------------------------------------------------

    @_never_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any torch optimizer's; drops what `synchronize` exchanged as well, on all ranks where all call it."""
        self._drop_exchanged()
        super().zero_grad(set_to_none)

    @_never_compiled
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
        try:
            return self._step(closure, max_norm)
        except JointSparError:
            self._forget_scaler()
            raise
        except BaseException:
            self._forget_scaler()
            with suppress(JointSparError):  # what came from outside is what the caller is to see
                self._pipeline.draw_what_was_left()
            raise

    def _step(self, closure: Callable[[], Any] | None, max_norm: float | None) -> Any:
        self._pipeline.backward.check_owner()
        refuse_capture(self._parameters[0].device)
        self._hyper.follow(self.param_groups)
        check_kind("closure", closure, "a function", closure is None or callable(closure))
        if max_norm is not None and self._exchanged is not None:
            raise ValueError("max_norm: the gradients were exchanged already; give it to synchronize()")
        if closure is not None and self._exchanged is not None:
            raise ValueError("closure: the gradients were exchanged already; call step() without it")
        if getattr(self, "grad_scale", None) is not None and self._exchanged is not None:
            self._drop_exchanged()
            raise JointSparError(
                "scaled gradients were exchanged: call scaler.unscale_(optimizer) before synchronize(). What was "
                "exchanged is dropped; the step can be made again"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._exchanged is None:
            self._exchange_gradients(max_norm)
        else:  # on every rank, whichever of them looked at mean_grads
            self._pipeline.agree_on_changes(self._exchanged, self._hyper)
        exchanged, self._exchanged = self._exchanged, None
        assert exchanged is not None
        self._pipeline.apply(exchanged, self._update, self._hyper)
        self._pipeline.finish_step(exchanged)
        return loss

    @_never_compiled
    @torch.no_grad()
    def synchronize(self, *, max_norm: float | None = None) -> None:
        """Exchange the gradients now, so that `mean_grads` can be looked at or changed before `step()`.

        Collective. max_norm: as in `step`. With a GradScaler call its `unscale_` first. Change mean_grads alike on all
        ranks. `zero_grad` before the step drops what was exchanged.
        """
        if self._exchanged is not None:
            raise JointSparError("synchronize() was called twice without a step() between")
        refuse_capture(self._parameters[0].device)
        self._hyper.follow(self.param_groups)
        self._exchange_gradients(max_norm, is_looked_at=True)

    def count_flops(self, model: torch.nn.Module, *inputs: Any) -> None:
        """Run one forward to learn what each layer's weight gradients cost; `stats` then counts what was skipped.

        In the mode that the model is in, with gradients enabled. Weights, gradients, buffers and torch's random state
        stay as they are. A model whose forward communicates (SyncBatchNorm) needs the call on all ranks.
        """
        self._pipeline.flops = weight_grad_flops(
            model, [[self._parameters[index] for index in layer.parameters] for layer in self.layers], *inputs
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """A context whose backward passes only accumulate, as `DistributedDataParallel.no_sync`.

        With overlap=True for all backward passes of a step but the last, and for those of another optimizer's loss that
        reach these parameters; without overlap every backward only accumulates.
        """
        early = self._pipeline.exchange.early
        return nullcontext() if early is None else early.paused()

    def release(self) -> None:
        """Give `requires_grad` of all parameters back as it was found (or as the user set it since).

        The next `step()` takes it again.
        """
        self._pipeline.backward.release()

    def set_trainable(self, parameters: Iterable[torch.Tensor], trainable: bool) -> None:
        """Freeze or thaw parameters in mid-training, on all ranks alike.

        Frozen ones are left alone from now on, thawed ones train from the next iteration on. Setting `requires_grad`
        directly is honoured too where it is visible; but a layer that is inactive at that moment has the flag off
        already, on this rank or another, so prefer this call.
        """
        if self._exchanged is not None:
            raise JointSparError("set_trainable: not between synchronize() and step()")
        position_of = {id(parameter): position for position, parameter in enumerate(self._parameters)}
        check_kind("trainable", trainable, "True or False", isinstance(trainable, (bool, np.bool_)))
        check_kind("parameters", parameters, "parameters", isinstance(parameters, Iterable))
        chosen = list(parameters)
        if any(id(parameter) not in position_of for parameter in chosen):
            raise ValueError("parameters: not all of them belong to this optimizer")
        self._pipeline.backward.set_trainable([position_of[id(parameter)] for parameter in chosen], trainable)

    def even_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over this rank's batches until the first rank has no more; all ranks then end after the same step.

        Collective, with a `step()` after each batch (or after several, as long as one follows the last). One agreement
        at the start, none later: a step's header says whether the rank has just used its last batch. Batches are
        therefore fetched one ahead, and what longer loaders hold beyond the shortest is left out.

        Raises: JointSparError where no step followed the last batch, or another such loop began in the meantime,
        DesyncError where ranks differ in their calls.
        """
        is_iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        check_kind("batches", batches, "something to iterate over", is_iterable)
        iterator = iter(batches)
        following = next(iterator, _NO_BATCH)
        this_loop = self._batches_loop = object()
        self._pipeline.agreement.wish(Wish.LAST_BATCH, following is _NO_BATCH)
        self.meet(Op.BATCHES)
        while True:
            if self._batches_loop is not this_loop:
                raise JointSparError(
                    "even_batches: another loop began before this one ended, and has taken its place; batches that "
                    "belong together come from one loop, over zip(...) of their loaders"
                )
            if self._pipeline.agreement.is_wished(Wish.LAST_BATCH):  # another agreement after shrink()
                return
            if following is _NO_BATCH:
                raise JointSparError("even_batches: no step() followed this rank's last batch")
            batch, following = following, next(iterator, _NO_BATCH)
            self._pipeline.agreement.wish(Wish.LAST_BATCH, following is _NO_BATCH)
            yield batch

    def request_stop(self) -> None:
        """Make `stop_requested` true on all ranks after their next step. Any rank may call it, signal handlers too."""
        self._pipeline.agreement.wish(Wish.STOP)

    @property
    def stop_requested(self) -> bool:
        """Whether any rank had called `request_stop` when the last step was agreed on; the same on all ranks."""
        return self._pipeline.agreement.is_wished(Wish.STOP)

    @property
    def is_rank_local(self) -> bool:
        """Whether each rank's state differs beyond repair, so that a checkpoint needs as many ranks to continue."""
        return self._pipeline.is_rank_local

    def meet(self, op: Op, detail: int = 0) -> None:
        """Wait for all ranks to come to `op` in this step. Raises DesyncError where one does something else."""
        if self._exchanged is not None:
            raise JointSparError(f"{op.name.lower()}: not between synchronize() and step()")
        self._pipeline.agreement.go(op, step=self._pipeline.step_count, agreed=detail)

    def finish(self) -> None:
        """Agree with all ranks that training is over. Collective; runs at exit where it was not called."""
        self._pipeline.agreement.finish()

    def _drop_exchanged(self) -> None:
        if self._exchanged is not None:
            self._exchanged = None
            self._pipeline.exchange.discard()

    def _forget_scaler(self) -> None:
        """Drop what GradScaler left for a step that was not made: it would multiply its scale by it next time."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _exchange_gradients(self, max_norm: float | None, is_looked_at: bool = False) -> None:
        check_kind("max_norm", max_norm, "a number", max_norm is None or isinstance(max_norm, Real))
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm: {max_norm} is not above 0")
        self._exchanged = self._pipeline.exchange_gradients(
            self._hyper,
            grad_scale=_as_float(getattr(self, "grad_scale", None), 1.0),
            found_inf=_as_float(getattr(self, "found_inf", None), 0.0),
            max_norm=max_norm,
            is_looked_at=is_looked_at,
        )

    @torch.no_grad()
    def shrink(self) -> int:
        """After RanksLost: go on with the ranks that are left, from the last step that any of them completed.

        Collective among them; again where it raises RanksLost itself. For a transport of
        `jointspar.comm.mpi(on_failure="shrink")`. Weights, momenta and what the ranks share of the distribution become
        those of a rank that is furthest; means are over the ranks that are left. Gradients of a step under way are
        void: call `zero_grad` and compute them anew. Rates are not scaled to the smaller world. At its exit such a
        process has 20 s to end, since MPI's own end may hang after a loss: longer work belongs before the exit, not in
        exit handlers.

        Returns: the number of steps made, from which all go on; an lr scheduler of this rank may be one behind.
        Raises: JointSparError where the transport cannot shrink, or the exchange is a CustomExchange.
        """
        self._exchanged = None
        self._forget_scaler()
        self._pipeline, self._update = go_on_without(
            self._pipeline, self._make_pipeline, self._parameters, self._momenta, self._update_type
        )
        return self._pipeline.step_count


def _as_float(value: Any, default: float) -> float:
    return default if value is None else float(value)
