"""JointSparLARS and JointSparSGD: their arguments, hyperparameters and updates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from jointspar.base_optimizer import JointSparOptimizer
from jointspar.comm.transport import Transport
from jointspar.step.exchange import CustomExchange
from jointspar.step.sampling import Sampling
from jointspar.step.update import LarsUpdate, SgdUpdate


class JointSparLARS(JointSparOptimizer):
    """JointSpar with layer-wise adaptive rate scaling: computes, sends and applies gradients of sampled layers only.

    The expected exchanged gradient `mean_grad` is the dense mean gradient. LARS normalises by its norm, so the
    expected *step* is not the dense LARS step (with strategy="shared" the 1/p scale cancels altogether: the effective
    rate of a layer is p * lr). With budget=1.0, one rank and wire_dtype=None it is LARS, bit for bit. Clip with
    `step(max_norm=...)`: `clip_grad_norm_` before the step clips this rank's gradient only.

    Collective: every rank builds it with the same arguments, of the bare model (DistributedDataParallel around it would
    wait for gradients that are not computed), where it will stay (after `model.to`). Rank 0's weights go to all ranks,
    those that are given here; buffers and parameters left out are the user's to make alike. Kernels write parameters in
    place, and momenta, which `state` shows: zero them there to begin anew. An active parameter without a gradient has
    one of zeros, so that momentum and weight decay move it.

    Toggles requires_grad of the parameters: between steps it is True on the active layers of the coming iteration only
    (and, where none of them is known to be in the loss, as before the first backward, on one or two parameters whose
    gradients are dropped), and a copy of the model that is made meanwhile has the flags of that moment. So choose by
    requires_grad (what to average, save, or give to another optimizer) and register hooks on parameters before the
    optimizer is built, or after `release()`, which gives the flags back until the next step; freeze and thaw by
    `set_trainable`. Ask `torch.autograd.grad` for a parameter's gradient only while its layer is active. Losses of
    separate parts of a model are added up before one backward, since a part whose layers are all inactive has none;
    where losses leave parts out by turns, `zero_grad` with set_to_none=True, the default. Write weights under
    `torch.no_grad()`: what goes through `.data` is not noticed, and LARS's norm of these weights is old for a step.
    Build it after `load_state_dict(assign=True)`; to swap parameters
    (`torch.__future__.set_swap_module_params_on_conversion`) is not possible while it lives. Write weights on all ranks
    or on none, also an average that is swapped in and out: LARS measures the norms of what was written again, which on
    a GPU may round otherwise than on ranks that carry theirs. All ranks need the same kind of processor and libraries:
    learnt probabilities are made with logarithms, whose last bits may differ, which is a DesyncError.

    Args:
        params: `model.named_parameters()`, tensors, or parameter groups of either. Layers may span groups.
            float32, float64, bfloat16 or float16, all on the CPU or on one CUDA device; momentum is kept in float32
            (float64 for float64), also for frozen parameters: leave out those that stay frozen.
        lr, momentum, weight_decay, trust_coefficient, eps, nesterov: see `jointspar.ops.lars_update`; all but
            nesterov may differ by group. The host reads them: one in a CUDA tensor has every step wait for the device.
        adapt_vectors: also adapt and decay tensors of one dimension (biases, normalisation); per group.
        inactive: a layer that no rank computed is left alone ("skip"), or momentum and weight decay go on ("decay"),
            at `lr` itself; with LARS weight decay is then 1 / local rate times that of an active step.
        sampling: see `Sampling`.
        comm: transport of the ranks; default `jointspar.comm.world()`.
        wire_dtype: dtype of the exchanged buffer; default float32 (float64 when a parameter is float64).
        exchange: "allreduce" (the transport library's), "ring" (own, any dtype), "two_shot" (own, any dtype, sends only
            what ranks computed), or "auto": for each step the one that promises the least time, by a measurement at
            construction (under a second, some more on a slow link). With three ranks or more the three round
            differently, so name one where separate runs must give the same bits; a resumed run keeps the measurement
            of its state. Or an exchange of your own: see `jointspar.step.exchange.CustomExchange`.
        check_every: after so many steps the ranks compare digests of their weights, layer by layer, so that a bit that
            flipped on one rank is a DesyncError; 0 for never. It reads every weight once, one to two milliseconds a MB.
        overlap: exchange gradients while backward computes the next ones, from a thread of its own, as
            DistributedDataParallel does. It is for one backward a step (accumulate inside `no_sync()`) whose gradients
            stay as they are until `step()`: after a second backward, `clip_grad_norm_`, a GradScaler's unscaling, or
            another meeting of the ranks, all of which were in backward, the step exchanges anew, which costs what
            overlap gains, with a warning. (Writes through `grad.data` are not noticed.) Of several optimizers on one
            transport the one built last sends during backward, and is best stepped first. Host memory, and no exchange
            of your own. Gradients are sent in another order, so that with three ranks or more sums round differently.

    Raises: ValueError or TypeError for arguments out of range, DesyncError where ranks were given different ones,
    JointSparError for overlap with an MPI that was started below MPI_THREAD_MULTIPLE.
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
        exchange: str | CustomExchange = "auto",
        check_every: int = 0,
        overlap: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps,
            nesterov=nesterov, adapt_vectors=adapt_vectors,
        )  # fmt: skip
        super().__init__(
            params, defaults, inactive=inactive, sampling=sampling, comm=comm, wire_dtype=wire_dtype, exchange=exchange,
            check_every=check_every, overlap=overlap,
        )  # fmt: skip


class JointSparSGD(JointSparOptimizer):
    """JointSpar with SGD, momentum and weight decay as `torch.optim.SGD`.

    The expected gradient is the dense mean gradient. The expected step is the dense step with inactive="decay", or
    where some rank computes each layer in every step (strategy="stratified" and no probability below 1 / world_size, as
    by default where the budget is at least that fraction); otherwise momentum and weight decay act only in those steps
    in which a layer is computed.

    Arguments as `JointSparLARS`, without those of LARS itself (trust_coefficient, eps, adapt_vectors).

    Source: Liu & Mozafari 2022, Algorithm 2 (JointSpar).
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
        exchange: str | CustomExchange = "auto",
        check_every: int = 0,
        overlap: bool = False,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(
            params, defaults, inactive=inactive, sampling=sampling, comm=comm, wire_dtype=wire_dtype, exchange=exchange,
            check_every=check_every, overlap=overlap,
        )  # fmt: skip
