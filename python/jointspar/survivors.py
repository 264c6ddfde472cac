"""What the ranks that are left do after others have died: agree on one state, and go on from there.

A rank that died in the middle of a step leaves the others one step apart at most, since each step begins with a header
from every rank. Whoever is furthest gives its state to all. It is put in place only when every rank has received it,
so that a further loss meanwhile leaves each rank with one step's state, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from jointspar.comm.transport import Transport
from jointspar.errors import JointSparError
from jointspar.pipeline import Pipeline
from jointspar.step.update import LarsUpdate, SgdUpdate

Update = LarsUpdate | SgdUpdate


def go_on_without(
    before: Pipeline,
    make_pipeline: Callable[[Transport], Pipeline],
    parameters: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    make_update: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Update],
) -> tuple[Pipeline, Update]:
    """A pipeline and an update of the ranks that are left, in the state of the furthest of them.

    Mutates parameters and momenta. Collective among those ranks.
    Raises RanksLost where more are lost meanwhile, after which it can be called again.
    """
    if before.chooser.is_custom:
        raise JointSparError("an exchange of your own may hold state of the ranks that died: start from a checkpoint")
    state = before.state_dict() | {"lesson": {}, "exchange": {}}  # of another number of ranks
    after = make_pipeline(_shrunk(before.comm))
    after.agreement.take_over_wishes(before.agreement)
    rows = after.comm.start_headers(np.array([before.step_count]), what="the steps of the ranks that are left").wait()
    root = int(rows.argmax())
    is_own = after.sampling.strategy == "independent"
    tensors = [*parameters, *momenta]
    received = [_received(after.comm, tensor, root) for tensor in (*tensors, _counters(state, is_own=is_own))]
    after.comm.start_headers(np.zeros(1, dtype=np.int64), what="all have received the state").wait()
    state = _with_counters(state, received[-1], is_own=is_own)
    for tensor, value in zip(tensors, received[:-1], strict=True):
        tensor.copy_(value)
    before.put(state)  # what `before` counts is of these weights now, should more be lost before `after` is there
    after.load_state_dict(state)
    after.stats, after.flops = before.stats, before.flops
    return after, make_update(parameters, momenta)


def _shrunk(transport: Transport) -> Transport:
    latest: Any = transport
    while getattr(latest, "successor", None) is not None:  # shrunk before, and then more were lost
        latest = latest.successor
    if not hasattr(latest, "shrink"):
        raise JointSparError(f"{latest.name} cannot go on without the ranks that died: use js.comm.mpi")
    if latest is not transport and latest.is_usable:  # another optimizer on this transport has shrunk it
        return latest
    return latest.shrink()


def _received(comm: Transport, tensor: torch.Tensor, root: int) -> torch.Tensor:
    """Root's tensor, in new memory."""
    value = tensor.detach().clone(memory_format=torch.preserve_format).cpu()
    comm.broadcast(value.as_strided((value.numel(),), (1,)), root, what=f"state of rank {root}")
    return value


def _arrays(state: dict[str, Any], *, is_own: bool) -> list[tuple[dict[str, Any], str]]:
    """Where those parts of a pipeline's state stand that all ranks share."""
    distribution = state["distribution"]
    places = [(state, "step"), (state, "skipped_in_a_row")]
    places += [(state, "trainable"), (state, "trainable_before")]
    return places if is_own else places + [(distribution, name) for name in sorted(distribution)]


def _counters(state: dict[str, Any], *, is_own: bool) -> torch.Tensor:
    """float64: all of them hold numbers below 2**53."""
    places = _arrays(state, is_own=is_own)
    return torch.cat(
        [torch.as_tensor(part[name], dtype=torch.float64, device="cpu").reshape(-1) for part, name in places]
    )


def _with_counters(state: dict[str, Any], values: torch.Tensor, *, is_own: bool) -> dict[str, Any]:
    """The state, mutated, with root's values."""
    for part, name in _arrays(state, is_own=is_own):
        own = torch.as_tensor(part[name], device="cpu")
        value, values = values[: own.numel()], values[own.numel() :]
        part[name] = value.to(own.dtype).reshape(own.shape) if own.ndim else value.item()
    return state
