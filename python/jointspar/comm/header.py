"""The agreement of all ranks before any payload: never a wrong sum, never a hang because one rank went elsewhere.

Headers are fixed-size int64 rows that every rank sends to every rank on a communicator of their own:

- *hello*, once at construction: layout and settings.
- *plan*, posted at the end of each step and in flight during the next forward: the active layers of that step.
- *go*, immediately before each payload, save, load, average and finish: what this rank is about to do. With exchanges
  during backward: one at a step's first gradient, and one at its end, by which any rank has what was sent be void.
- *leave*, once when the process exits: a rank that leaves early meets the others, whatever they wait for.

Why ranks that diverge still meet. Each rank emits one sequence of headers, and the n-th header of one rank meets the
n-th header of every other: up to the first difference all ranks had the same n - 1 before it. All headers name their
operation, and their size follows from the hellos before them (the largest that any optimizer on the transport needs,
whatever layouts the next hello brings), so whichever two of these meet, each is read whole and the difference is seen:
a rank that waits for the plan of step 12 and one that finishes first both complete that plan, then meet as "step 12
exchange" against "finish". All ranks judge the same gathered rows by the same rules, hence all raise or none does, and
no rank is left behind in a payload. A rank that sends nothing any more is a matter of the transport's deadline.

Rows of other sizes travel here too, without a head: when a difference between hellos is explained, when exchanges are
chosen and measured, when CUDA memory is agreed on, when all ranks are to be able to save, and when the ranks that are
left share their state. A rank that leaves the construction of an optimizer half-way, by an exception that it alone
meets and catches, sends its next header while the others send such rows. No DesyncError names that: the library below
reports a message of another size, or ends the process.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Sequence
from functools import reduce
from operator import or_
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch

from jointspar.comm.differences import differing_layers, differing_ranks, differing_settings
from jointspar.comm.hashing import stable_hash
from jointspar.comm.heads import NUM_FIXED, Op, Wish, describe, different_heads, new_header, reserve_words
from jointspar.comm.transport import PEER_GRACE_SECONDS, PendingHeaders, Transport
from jointspar.errors import DesyncError, JointSparError, RanksLost

_MAX_SETTINGS = 64
_MAX_LISTED_LAYERS = 4096
_ALL_WISHES = Wish.STOP | Wish.LAST_BATCH | Wish.EXCHANGE_ANEW

# Words of a hello after its head.
_WORLD_SIZE, _NUM_LAYERS, _LAYERS, _ALWAYS, _SETTINGS_HELLO, _NUM_VALUES = range(4, 10)
# Words of a plan or go after its head. Wishes are not compared.
_LAYOUT, _SETTINGS, _HASH, _COUNT, _DTYPE, _WISHES = range(4, 10)

# What the hash of a go covers, in words.
_DIFFERENCES = {
    Op.AVERAGE: "number, shapes, dtypes or layouts of the model's buffers differ",
    Op.LOAD: "the checkpoints that were found, or the states that were loaded, differ",
}
_OTHER_DIFFERENCE = "the chosen exchange, learning rates, other hyperparameters, or which parameters are frozen differ"

_DTYPES = (None, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
_num_agreements: WeakKeyDictionary[Transport, int] = WeakKeyDictionary()
_current: WeakKeyDictionary[Transport, ReferenceType[Agreement]] = WeakKeyDictionary()


class Agreement:
    """Compares what all ranks are about to do, for one optimizer; construction is collective.

    layer_names, layer_hashes: one per layer (a hash covers names, shapes, strides, dtypes of its tensors).
    always_active_hash: the same for the parameters outside the layers.
    settings: everything that must be the same on all ranks, except learning rates; at most 64.
    num_values: float64 numbers per rank that ride along with each go and are not compared.
    Raises DesyncError on every rank when any of these differ.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        layer_names: Sequence[str],
        layer_hashes: Sequence[int],
        settings: dict[str, object],
        num_values: int,
        always_active_hash: int = 0,
    ) -> None:
        if len(layer_names) != len(layer_hashes):
            raise ValueError(f"layer_hashes must have one entry for each of {len(layer_names)} layer_names")
        if len(settings) > _MAX_SETTINGS:
            raise ValueError(f"settings must be at most {_MAX_SETTINGS}, not {len(settings)}")
        self._transport = transport
        self._layer_names = list(layer_names)
        self._layer_hashes = [int(value) for value in layer_hashes]
        self._always_active_hash = int(always_active_hash)
        self._settings = dict(settings)
        self._num_values = num_values
        self._layout_hash = stable_hash([self._layer_hashes, self._always_active_hash])
        self._settings_hash = stable_hash(self._settings)
        self._serial = _num_agreements[transport] = _num_agreements.get(transport, 0) + 1
        self._step = 0
        self._pending_plan: PendingHeaders | None = None
        self._plan: np.ndarray | None = None  # bool [world_size, num_layers], the last completed
        self._own_wishes: set[Wish] = set()
        self._agreed_wishes = Wish(0)
        self._is_over = self._has_finished = False
        self._pid = os.getpid()
        _current[transport] = ref(self)
        if transport.world_size > 1:
            self._say_hello()
            reserve_words(transport, max(-(-len(layer_names) // 64), num_values))
            if transport.is_simulated:  # closed before any exit, but its ranks collect garbage at different times
                transport.latest_agreement = self  # type: ignore[attr-defined]
            else:
                atexit.register(self._finish_at_exit)

    @property
    def is_over(self) -> bool:
        """Whether the ranks have finished, or disagreed."""
        return self._is_over

    @property
    def step(self) -> int:
        """The step of the last posted plan."""
        return self._step

    def post_plan(self, step: int, active: np.ndarray, shared: object = None) -> None:
        """Start telling the others which layers this rank computes in `step`; returns at once.

        active: bool [num_layers]. shared: the probabilities and the draw, where they are the same on all ranks.
        A plan that nobody asked for is replaced: after a load another step is planned.
        """
        self._check_open()
        active = np.ascontiguousarray(active, dtype=bool)
        if active.shape != (len(self._layer_names),):
            raise ValueError(f"active must be bool [{len(self._layer_names)}], not shape {active.shape}")
        self._complete_plan()
        self._step, self._plan = int(step), None
        if self._transport.world_size == 1:
            self._plan = active[None].copy()
            return
        words = self._words(Op.PLAN, step, shared)
        bits = np.packbits(active, bitorder="little")
        words[NUM_FIXED:].view(np.uint8)[: bits.size] = bits
        self._pending_plan = self._transport.start_headers(words, what=describe(Op.PLAN, step))

    def wait_plan(self) -> np.ndarray:
        """The posted plan of all ranks, bool [world_size, num_layers]. Raises DesyncError on every rank.

        Stays until the next is posted, so that a step that raised on this rank before its go can be made again.
        """
        self._check_open()
        self._complete_plan()
        if self._plan is None:
            raise JointSparError("wait_plan() without a post_plan() before it")
        return self._plan

    def go(
        self,
        op: Op,
        *,
        step: int,
        count: int = 0,
        dtype: torch.dtype | None = None,
        agreed: object = None,
        values: np.ndarray | None = None,
        wish: Wish = Wish(0),  # noqa: B008
    ) -> np.ndarray:
        """Meet all ranks before `op`; returns everybody's values, float64 [world_size, num_values].

        count, dtype: elements of the payload. agreed: learning rates and what else may change between steps, compared
        by its `stable_hash`.
        values: float64 [num_values] of this rank, not compared; zeros when None. wish: for this time only.
        Raises DesyncError on every rank when op, step, count, dtype or agreed differ.
        """
        self._check_open()
        own_wishes = reduce(or_, tuple(self._own_wishes), wish)
        own = np.zeros(self._num_values) if values is None else np.ascontiguousarray(values, dtype=np.float64)
        if own.shape != (self._num_values,):
            raise ValueError(f"values must be float64 [{self._num_values}], not shape {own.shape}")
        self._complete_plan()
        if self._transport.world_size == 1:
            self._agreed_wishes = own_wishes
            return own[None].copy()
        words = self._words(op, step, agreed)
        words[_WISHES] = own_wishes
        words[_COUNT] = count
        words[_DTYPE] = _DTYPES.index(dtype)
        words[NUM_FIXED : NUM_FIXED + own.size] = own.view(np.int64)
        rows = self._transport.start_headers(words, what=describe(op, step)).wait()
        self._compare(rows, describe(op, step), _DIFFERENCES.get(op, _OTHER_DIFFERENCE))
        if op != Op.OVERLAP:  # it comes in the midst of backward, on each rank at its own time
            self._agreed_wishes = Wish(int(np.bitwise_or.reduce(rows[:, _WISHES])) & _ALL_WISHES)
        return rows[:, NUM_FIXED : NUM_FIXED + own.size].copy().view(np.float64)

    def compare_digests(self, step: int, digests: np.ndarray) -> None:
        """Meet all ranks and compare a number for each layer, and a last one for the parameters outside the layers.

        digests: int64 [num_layers + 1], where num_values is as much. Raises DesyncError on every rank when any differ.
        """
        rows = self.go(Op.CHECK, step=step, values=digests.view(np.float64)).view(np.int64)
        num_layers = len(self._layer_names)
        texts = differing_layers(np.full(len(rows), num_layers), rows[:, :num_layers], self._layer_names)
        ranks = differing_ranks(rows[:, num_layers])
        texts += [f"the always-active parameters differ: {ranks} against rank 0"] if ranks else []
        if texts:
            self._fail(f"{describe(Op.CHECK, step)}: " + "; ".join(texts))

    def wish(self, wish: Wish, is_wished: bool = True) -> None:
        """Tell the other ranks with the next go, and those that follow. Safe in a signal handler."""
        if is_wished:
            self._own_wishes.add(wish)
        else:
            self._own_wishes.discard(wish)

    def take_over_wishes(self, before: Agreement) -> None:
        """Go on wishing what this rank wished of other ranks, of whom some are lost."""
        self._own_wishes = before._own_wishes

    def is_wished(self, wish: Wish) -> bool:
        """Whether any rank wished it at the last go; the same on all ranks."""
        return wish in self._agreed_wishes

    def finish(self) -> None:
        """Agree that all ranks are done; again after that it does nothing. Runs at exit where nobody called it."""
        if self._has_finished:
            return
        self._transport.take_back()  # from an exchange during backward, in which the ranks may have disagreed
        if not self._is_over:
            self.go(Op.FINISH, step=self._step)
            self._close()
        self._has_finished = True

    def _words(self, op: Op, step: int, compared: object) -> np.ndarray:
        words = new_header(self._transport, self._serial, op, step)
        words[_LAYOUT], words[_SETTINGS], words[_HASH] = self._layout_hash, self._settings_hash, stable_hash(compared)
        return words

    def _complete_plan(self) -> None:
        if self._pending_plan is None:
            return
        rows = self._pending_plan.wait()
        self._pending_plan = None
        self._compare(rows, describe(Op.PLAN, self._step), "the shared probabilities or draws differ")
        bits = np.ascontiguousarray(rows[:, NUM_FIXED:]).view(np.uint8)
        self._plan = np.unpackbits(bits, axis=1, bitorder="little")[:, : len(self._layer_names)].astype(bool)

    def _compare(self, rows: np.ndarray, what: str, hash_differs: str) -> None:
        """Raise DesyncError for the first kind of difference, in the same way on all ranks."""
        if (rows[:, :_WISHES] == rows[0, :_WISHES]).all():  # nearly always; one row then stands for all
            self._check_heads(rows[:1])
            return
        self._check_heads(rows)
        differences = {
            _LAYOUT: "the layer layouts differ",
            _SETTINGS: "the settings differ",
            _HASH: hash_differs,
            _COUNT: "the numbers of elements differ",
            _DTYPE: "the dtypes differ",
        }
        for word, text in differences.items():
            ranks = differing_ranks(rows[:, word])
            if ranks:
                self._fail(f"{what}: {text}: {ranks} against rank 0")

    def _say_hello(self) -> None:
        words = new_header(self._transport, self._serial, Op.HELLO, 0)
        words[_WORLD_SIZE] = self._transport.world_size
        words[_NUM_LAYERS] = len(self._layer_names)
        words[_LAYERS] = stable_hash(self._layer_hashes)
        words[_ALWAYS] = self._always_active_hash
        words[_SETTINGS_HELLO] = self._settings_hash
        words[_NUM_VALUES] = self._num_values
        rows = self._transport.start_headers(words, what="agreement on layers and settings").wait()
        self._check_heads(rows)
        if (rows != rows[0]).any():
            self._fail("; ".join(self._explain(rows)))

    def _explain(self, hellos: np.ndarray) -> list[str]:
        """A second exchange, of all single hashes, that names what differs: all ranks saw it, so all join."""
        num_listed = int(np.clip(hellos[:, _NUM_LAYERS].max(), 0, _MAX_LISTED_LAYERS))
        words = np.zeros(2 * _MAX_SETTINGS + num_listed, dtype=np.int64)
        names = sorted(self._settings)
        for k, name in enumerate(names):
            words[2 * k : 2 * k + 2] = stable_hash(name), stable_hash(self._settings[name])
        words[2 * _MAX_SETTINGS :][: len(self._layer_hashes)] = self._layer_hashes[:num_listed]
        rows = self._transport.start_headers(words, what="explaining a difference").wait()
        texts = differing_settings(rows[:, : 2 * _MAX_SETTINGS], self._settings)
        texts += differing_layers(hellos[:, _NUM_LAYERS], rows[:, 2 * _MAX_SETTINGS :], self._layer_names)
        for word, text in ((_ALWAYS, "the always-active parameters differ"), (_NUM_VALUES, "num_values differs")):
            ranks = differing_ranks(hellos[:, word])
            texts += [f"{text}: {ranks} against rank 0"] if ranks else []
        return texts or ["layouts or settings differ"]

    def _check_heads(self, rows: np.ndarray) -> None:
        difference = different_heads(rows)
        if difference:
            self._fail(difference)

    def _fail(self, text: str) -> None:
        self._close()
        raise DesyncError(f"rank {self._transport.rank}: {text}")

    def _close(self) -> None:
        self._is_over = True
        atexit.unregister(self._finish_at_exit)

    def _check_open(self) -> None:
        if self._is_over:
            raise JointSparError("the ranks have finished or disagreed: this optimizer can take no further step")

    def _finish_at_exit(self) -> None:
        """A rank that leaves early meets the others here, so that they learn of it instead of waiting for it."""
        if os.getpid() != self._pid or self._transport.is_closed:
            return
        try:
            self._transport.take_back()  # what is under way has its deadline
            self._transport.timeout = math.inf  # another rank may evaluate for long before it comes here
            self.finish()
        except RanksLost:
            self._transport.leave_alone()
        except JointSparError as error:
            if isinstance(error, DesyncError):
                time.sleep(PEER_GRACE_SECONDS)
            self._transport.abort(f"at exit: {error}")


def current_agreement(transport: Transport) -> Agreement:
    """The agreement made last on this transport, or a new one without layers: for collectives outside an optimizer."""
    known = _current.get(transport)
    agreement = known() if known is not None else None
    if agreement is not None and not agreement._is_over:
        return agreement
    return Agreement(transport, layer_names=[], layer_hashes=[], settings={}, num_values=0)
