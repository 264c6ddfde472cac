"""The methods that are compared: each makes, of a model and the ranks, training iterations that are timed by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import jointspar as js
from jointspar import ops
from jointspar.comm.transport import Transport
from jointspar.step.exchange import Chooser, Slices
from step.models import Batch
from step.peers import TOPK_FRACTION, Hook, TopK, TorchLars, data_parallel, hook_of

PHASES = ("forward", "backward", "pack", "exchange", "update", "other")
# The optimizer's own phases. Agreeing on a step is part of its exchange, measuring its result part of LARS.
PHASE_OF = {
    "plan": "exchange", "pack": "pack", "go": "exchange", "exchange": "exchange", "measure": "update",
    "update": "update", "probabilities": "other", "sample": "other",
}  # fmt: skip
LARS: Mapping[str, float] = {"momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.02, "eps": 1e-8}
STRATEGIES, BUDGETS = ("stratified", "independent", "shared"), (0.75, 0.5, 0.25)
VARIANTS: Mapping[str, dict[str, Any]] = {  # at a budget of one half
    "_bf16": {"wire_dtype": "bfloat16"},
    "_overlap": {"overlap": True},
    "_bf16_overlap": {"wire_dtype": "bfloat16", "overlap": True},
}


class Laps:
    """Milliseconds of one iteration by phase; they add up to all the time since construction."""

    def __init__(self) -> None:
        self.ms = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def note(self, phase: str) -> None:
        """The time since the last note was spent in `phase`."""
        now = time.perf_counter()
        self.ms[phase] += 1e3 * (now - self._last)
        self._last = now

    def move(self, source: str, target: str, ms: float) -> None:
        """So much of one phase's time belongs to another."""
        self.ms[source] -= ms
        self.ms[target] += ms


@dataclass(frozen=True)
class Ranks:
    """How this rank reaches the others: by MPI, and by a gloo group."""

    comm: Transport  # of our methods
    group: dist.ProcessGroup  # of the peers
    gloo: Transport  # our methods over gloo

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size


@dataclass(frozen=True)
class Setting:
    """What a method is built from. lr: of LARS; seed: of the layer draws."""

    model: nn.Module
    ranks: Ranks
    lr: float
    seed: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


class Iteration:
    """A training iteration by one method: forward, backward, and what the method makes of the gradients."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.module: nn.Module = setting.model
        self.loss = torch.tensor(torch.nan)  # of the last iteration, on this rank
        self.exchange = "gloo" if setting.ranks.world_size > 1 else "none"  # what summed its gradients

    def run(self, batch: Batch) -> dict[str, float]:
        """One iteration; milliseconds by phase."""
        laps = Laps()
        self.module.zero_grad()
        laps.note("other")
        loss = functional.cross_entropy(self.module(batch[0]), batch[1])
        laps.note("forward")
        loss.backward()
        laps.note("backward")
        self.finish(laps)
        laps.note("other")
        self.loss = loss.detach()
        return laps.ms

    def finish(self, laps: Laps) -> None:
        """From this rank's gradients to the weights of the next iteration."""
        raise NotImplementedError

    @property
    def sent_bytes(self) -> int | None:
        """What this rank has handed to its transport so far; None where only a network interface can tell."""
        return None

    def close(self) -> None:
        """Leave the model as an ordinary one. Collective."""


class JointSpar(Iteration):
    """JointSparLARS as a user calls it."""

    def __init__(
        self,
        setting: Setting,
        *,
        budget: float,
        strategy: str,
        wire_dtype: str | None = None,
        over: str = "comm",
        overlap: bool = False,
    ) -> None:
        super().__init__(setting)
        self._comm: Transport = getattr(setting.ranks, over)
        sampling = js.Sampling(budget=budget, strategy=strategy, seed=setting.seed)
        self._optimizer = js.JointSparLARS(
            setting.model.named_parameters(), lr=setting.lr, sampling=sampling, comm=self._comm, wire_dtype=wire_dtype,
            overlap=overlap, **LARS,
        )  # fmt: skip

    def finish(self, laps: Laps) -> None:
        self._optimizer.step()
        laps.note("other")
        self.exchange = self._optimizer.stats.exchange
        for phase, ms in self._optimizer.stats.phase_ms.items():
            laps.move("other", PHASE_OF[phase], ms)

    @property
    def sent_bytes(self) -> int:
        return self._comm.bytes_sent

    def close(self) -> None:
        self._optimizer.finish()
        self._optimizer.release()


class Plain(Iteration):
    """Dense LARS by the same kernels and exchanges, without what the library adds: the floor for budget 1.0.

    No agreement among ranks, no check, no probabilities. One rank packs nothing either.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._params, self._comm = setting.parameters, setting.ranks.comm
        self._momenta = [torch.zeros_like(param, requires_grad=False) for param in self._params]
        self._param_norms: torch.Tensor | None = None
        sizes = np.array([param.numel() for param in self._params])
        self._packed = torch.empty(int(sizes.sum()))
        self._slices = Slices(sizes, np.ones((self._comm.world_size, sizes.size), dtype=bool))
        self._chooser = Chooser("auto", self._comm, torch.float32, is_partial=False)
        self._chooser.prepare(4 * self._packed.numel())
        self._weight_decay = [LARS["weight_decay"] if param.ndim >= 2 else 0.0 for param in self._params]

    @torch.no_grad()
    def finish(self, laps: Laps) -> None:
        grads: Any = [param.grad for param in self._params]
        if self._comm.world_size > 1:
            grads, _ = ops.pack_gradients(grads, 1.0 / self._comm.world_size, out=self._packed)
            laps.note("pack")
            self.exchange = self._chooser.choose(self._slices)
            self._chooser.exchange(self.exchange, grads, what="plain exchange", slices=self._slices)
            laps.note("exchange")
        hyper: dict[str, Any] = {**LARS, "lr": self.setting.lr, "weight_decay": self._weight_decay}
        norms = ops.lars_update(self._params, self._momenta, grads, param_norms=self._param_norms, **hyper)
        self._param_norms = norms.param_norms_after
        laps.note("update")

    @property
    def sent_bytes(self) -> int:
        return self._comm.bytes_sent


class DataParallel(Iteration):
    """DDP over gloo, and LARS by PyTorch's operations.

    DDP exchanges during backward. "backward" ends when the last gradient is there, and what follows until all sums have
    arrived is "exchange". "pack" is the time in the calls of the hook; without a hook DDP packs inside of backward.
    """

    def __init__(self, setting: Setting, *, hook: str | None = None, bucket_mb: int | None = None) -> None:
        super().__init__(setting)
        self._optimizer = TorchLars(setting.parameters, lr=setting.lr, **LARS)
        self.module = module = data_parallel(setting.model, setting.ranks.group, hook, bucket_mb)
        if hook is not None:
            state, function = hook_of(hook, setting.ranks.group)
            module.register_comm_hook(state, self._timed(function))
        self._pack_seconds = self._computed = 0.0
        first = setting.parameters[0]  # the last one to get its gradient
        self._mark = first.register_post_accumulate_grad_hook(self._note_computed)

    def _note_computed(self, _: torch.Tensor) -> None:
        self._computed = time.perf_counter()

    def _timed(self, hook: Hook) -> Hook:
        def timed(state: Any, bucket: Any) -> Any:
            began = time.perf_counter()
            future = hook(state, bucket)
            self._computed = time.perf_counter()
            self._pack_seconds += self._computed - began
            return future

        # DDP compares annotations. By its name it would refuse the bf16 hook, although gloo sums bfloat16.
        timed.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
        return timed

    def finish(self, laps: Laps) -> None:
        laps.move("backward", "exchange", 1e3 * (time.perf_counter() - self._computed))
        laps.move("backward", "pack", 1e3 * self._pack_seconds)
        self._pack_seconds = 0.0
        self._optimizer.step()
        laps.note("update")

    def close(self) -> None:
        self._mark.remove()
        self.module = self.setting.model


class TopKLars(Iteration):
    """Top-k with error feedback over gloo, and LARS by PyTorch's operations."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._optimizer = TorchLars(setting.parameters, lr=setting.lr, **LARS)
        self._topk = TopK(setting.parameters, setting.ranks.group, TOPK_FRACTION)

    def finish(self, laps: Laps) -> None:
        self._topk.select()
        laps.note("pack")
        self._topk.exchange()
        laps.note("exchange")
        self._topk.scatter()
        self._optimizer.step()
        laps.note("update")


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    role: "ours"; "dense" (a peer that sends every gradient); "compressed" (one that does not); "floor" (our kernels
    without the library around them).
    """

    name: str
    role: str
    build: Callable[[Setting], Iteration]  # collective


def _methods() -> list[Method]:
    hooks = {"ddp_bf16": "bf16", "ddp_fp16": "fp16"}
    budgets = [(strategy, budget) for strategy in STRATEGIES for budget in BUDGETS]
    return [
        Method("ddp", "dense", DataParallel),
        Method("ddp_4mb", "dense", partial(DataParallel, bucket_mb=4)),
        *(Method(name, "dense", partial(DataParallel, hook=hook)) for name, hook in hooks.items()),
        Method("ddp_powersgd", "compressed", partial(DataParallel, hook="powersgd")),
        Method("topk", "compressed", TopKLars),
        Method("plain", "floor", Plain),
        Method("jointspar_1.0", "ours", partial(JointSpar, budget=1.0, strategy="shared")),
        Method("jointspar_1.0_overlap", "ours", partial(JointSpar, budget=1.0, strategy="shared", overlap=True)),
        *(Method(f"{s}_{b}", "ours", partial(JointSpar, budget=b, strategy=s)) for s, b in budgets),
        *(
            Method(f"{s}_0.5{suffix}", "ours", partial(JointSpar, budget=0.5, strategy=s, **options))
            for suffix, options in VARIANTS.items()
            for s in STRATEGIES
        ),
        Method("stratified_0.5_gloo", "ours", partial(JointSpar, budget=0.5, strategy="stratified", over="gloo")),
    ]


METHODS = {method.name: method for method in _methods()}
