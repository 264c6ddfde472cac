"""What a transport offers: one interface for MPI, torch.distributed, simulated ranks and a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

PEER_GRACE_SECONDS = 1.0  # before an abort, so that ranks that fail with the same error can print theirs


class Pending(Protocol):
    """A started operation. Its buffers live as long as this object."""

    def wait(self) -> None:
        """Finish the operation.

        Raises CollectiveTimeout (rank, operation, seconds) past the transport's deadline.
        """

    def done(self) -> bool:
        """Make progress without waiting; True once finished."""


class PendingHeaders(Protocol):
    """A started header exchange."""

    def wait(self) -> np.ndarray:
        """Finish it; int64 [world_size, num_words], one row a rank."""


class Transport(Protocol):
    """Point-to-point and collective operations among ranks, each with a deadline.

    Every rank calls the same operations in the same order, from one thread at a time. `what` names the operation in
    errors ("step 12 exchange"). Headers travel apart from payloads, so a header may be in flight while payload moves.
    A transport that timed out or failed refuses any further use.
    """

    name: str  # "local", "mpi: Open MPI v5.0.11"
    rank: int
    world_size: int
    timeout: float  # seconds that one wait may last
    eager_bytes: int | None  # length of messages that are sent without waiting for an answer; None: makes no difference
    bytes_sent: int  # grows by what this rank hands over for sending, headers included
    is_simulated: bool  # nothing travels, so its times say nothing of a network
    is_thread_safe: bool  # a thread may use it beside others that use the library below
    is_in_background: bool  # set by who uses it beside a computation: waits that poll then poll less often

    @property
    def is_closed(self) -> bool:
        """By close(), or because the library below was shut down; a transport that failed is not closed."""

    def start_headers(self, words: np.ndarray, *, what: str) -> PendingHeaders:
        """Send int64 [num_words] to every rank and receive theirs; num_words is the same on all ranks."""

    def allreduce(self, buffer: torch.Tensor, *, what: str) -> None:
        """Sum a contiguous 1-D buffer over the ranks, in place, by the transport's own collective.

        Counts the buffer's bytes as sent: what the collective makes of them is its own affair.
        In CUDA memory only where `agree_on_cuda` said yes; the current stream's work on it is waited for.
        Raises TypeError for a dtype that `can_allreduce` denies.
        """

    def agree_on_cuda(self) -> bool:
        """Whether `allreduce` takes CUDA memory on every rank. Collective."""

    def can_allreduce(self, dtype: torch.dtype) -> bool:
        """Whether the transport's own collective sums this dtype."""

    def start_send(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Pending:
        """Send a contiguous 1-D buffer of any dtype to another rank, as bytes.

        tag: from 0 to 32767; messages to a rank with one tag keep their order.
        """

    def start_receive(self, buffer: torch.Tensor, rank: int, *, what: str, tag: int = 0) -> Pending:
        """Receive the next message of that tag into a contiguous 1-D buffer; its byte count must be the same."""

    def broadcast(self, buffer: torch.Tensor, root: int, *, what: str) -> None:
        """Copy root's contiguous 1-D buffer of any dtype to every rank, in place."""

    def lend(self, thread: int | None, give_back: Callable[[], None] | None = None) -> None:
        """To a thread (its ident) for a while: the first use by another calls give_back, which must lend it to None."""

    def take_back(self) -> None:
        """Have it given back now, where it is lent. Raises what the borrower met."""

    def fail(self, reason: str) -> None:
        """Refuse all further use, because an exchange was left unfinished; the first reason is kept."""

    def leave_alone(self) -> None:
        """At exit, after RanksLost: let the process end without meeting the ranks that are left."""

    def abort(self, message: str) -> None:
        """End the whole job at once with a non-zero exit code."""

    def close(self) -> None:
        """Free the communicators. Further calls raise."""


class _CanFail(Protocol):
    def fail(self, reason: str) -> None: ...


@contextmanager
def failing(transport: _CanFail, what: str) -> Iterator[None]:
    """Fail the transport where any exception ends the block, an interrupt between two waits too."""
    try:
        yield
    except BaseException as error:
        transport.fail(f"{what} was left by {type(error).__name__}")
        raise


def check_buffer(buffer: torch.Tensor) -> None:
    """Refuse what no transport may hand to another library.

    Raises TypeError for what is not a tensor, ValueError for one that is not 1-D and contiguous.
    """
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"buffer must be a torch.Tensor, not {type(buffer).__name__}")
    if buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(f"buffer must be 1-D and contiguous, not {tuple(buffer.shape)} of stride {buffer.stride()}")


def check_words(words: np.ndarray) -> np.ndarray:
    """An own contiguous copy of int64 [num_words]; raises TypeError for anything else."""
    if not isinstance(words, np.ndarray) or words.dtype != np.int64 or words.ndim != 1:
        raise TypeError("words must be an int64 array of one dimension")
    return words.copy()


def as_bytes(buffer: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor, uint8 [num_bytes]; with at most one element its stride may be anything."""
    return buffer.detach().as_strided((buffer.numel(),), (1,)).view(torch.uint8).numpy()
