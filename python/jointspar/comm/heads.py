"""The head that all headers share: who sends it and what that rank is about to do."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from weakref import WeakKeyDictionary

import numpy as np

from jointspar.comm.transport import Transport
from jointspar.errors import DesyncError

NUM_FIXED = 16  # words of a header before what depends on the layers

_MAGIC = 0x4A53_5041_0002  # "JSPA", protocol version
_SERIAL, _OP, _STEP = range(1, 4)  # word 0 is the magic number

_num_words: WeakKeyDictionary[Transport, int] = WeakKeyDictionary()


class Op(IntEnum):
    """What a rank is about to do."""

    PLAN = 1
    EXCHANGE = 2
    SAVE = 3
    LOAD = 4
    AVERAGE = 5
    UPDATE = 6
    FINISH = 7
    HELLO = 8
    LEAVE = 9
    BATCHES = 10
    CHECK = 11
    OVERLAP = 12


class Wish(IntFlag):
    """What one rank wants and all learn with the next go; it is not compared."""

    STOP = 1
    LAST_BATCH = 2
    EXCHANGE_ANEW = 4


def leave(transport: Transport) -> None:
    """Tell the other ranks that this one exits, and wait until all do. Raises DesyncError where one does not.

    For exits: a rank that leaves before, or without, an optimizer would otherwise be waited for.
    """
    rows = transport.start_headers(new_header(transport, 0, Op.LEAVE, 0), what="leaving").wait()
    difference = different_heads(rows)
    if difference:
        raise DesyncError(f"rank {transport.rank}: {difference}")


def reserve_words(transport: Transport, num_words: int) -> None:
    """From now on every header on the transport has room for so many words after the fixed ones.

    One size for all optimizers of a transport: whichever headers meet, each is read whole.
    """
    _num_words[transport] = max(NUM_FIXED + num_words, _num_words.get(transport, 0))


def new_header(transport: Transport, serial: int, op: Op, step: int) -> np.ndarray:
    """A header with all but its further words, int64 [num_words]."""
    words = np.zeros(_num_words.get(transport, NUM_FIXED), dtype=np.int64)
    words[0] = _MAGIC
    words[[_SERIAL, _OP, _STEP]] = serial, op, step
    return words


def different_heads(rows: np.ndarray) -> str:
    """How the ranks differ in what they are about to do; empty when they agree."""
    if (rows[:, 0] != _MAGIC).any():
        ranks = [rank for rank, word in enumerate(rows[:, 0]) if word != _MAGIC]
        return f"ranks {ranks} sent no header of this version: do all ranks run the same program and version?"
    heads = rows[:, [_SERIAL, _OP, _STEP]]
    if (heads != heads[0]).any():
        return "the ranks are about to do different things: " + _who_does_what(heads)
    return ""


def describe(op: int, step: int) -> str:
    if op == Op.HELLO:
        return "construction of an optimizer"
    if op == Op.LEAVE:
        return "exit of the process"
    if op == Op.CHECK:
        return f"check of the weights at step {step}"
    if op == Op.BATCHES:
        return f"start of a loop over batches at step {step}"
    if op == Op.OVERLAP:
        return f"step {step} exchange during backward"
    if op in (Op.PLAN, Op.EXCHANGE):
        return f"step {step} {Op(op).name.lower()}"
    name = Op(op).name.lower() if op in Op._value2member_map_ else f"unknown operation {op}"
    return f"{name} at step {step}"


def _who_does_what(heads: np.ndarray) -> str:
    """Rows of (serial, op, step) in words: "rank 0: step 12 exchange; rank 1: save at step 12"."""
    several = len({serial for serial, op, _ in heads.tolist() if op not in (Op.HELLO, Op.LEAVE)}) > 1
    texts = []
    for rank, (serial, op, step) in enumerate(heads.tolist()):
        optimizer = f" of optimizer {serial}" if several and op not in (Op.HELLO, Op.LEAVE) else ""
        texts.append(f"rank {rank}: {describe(op, step)}{optimizer}")
    return "; ".join(texts)
