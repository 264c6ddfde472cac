"""The ring among threads."""

import numpy as np
import pytest
import torch

from jointspar.comm import local
from jointspar.step.exchange import candidates
from jointspar.step.exchange.ring import ring
from jointspar.step.exchange.scratch import Scratch
from late_transport import on_threads


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 4, 1000, 300_000])
def test_ring_never_touches_memory_that_a_message_still_uses(world_size, length):
    inputs = np.random.default_rng(length).integers(-99, 99, (world_size, length)).astype(np.float64)
    buffers = [torch.tensor(row) for row in inputs]
    on_threads(world_size, lambda transport: ring(transport, buffers[transport.rank], what="test"))
    assert all((buffer.numpy() == inputs.sum(axis=0)).all() for buffer in buffers)


def test_one_rank_keeps_what_it_has():
    packed = torch.arange(5.0)
    for name in ("auto", "allreduce", "ring", "two_shot"):
        for exchange in candidates(name, local(), torch.float32).values():
            exchange(local(), packed, what="test")
    assert torch.equal(packed, torch.arange(5.0))


def test_scratch_slots_do_not_overlap_and_are_reused():
    scratch = Scratch()
    slots = scratch.slots(4, 100, torch.float32)
    for number, slot in enumerate(slots):
        slot.fill_(number)
    assert all((slot == number).all() for number, slot in enumerate(slots))
    smaller = scratch.slots(4, 7, torch.bfloat16)
    assert smaller[0].data_ptr() == slots[0].data_ptr()
    assert {slot.numel() for slot in smaller} == {7}
    assert all(slot.numel() == 0 for slot in Scratch().slots(4, 0, torch.float64))


@pytest.mark.parametrize("packed", [torch.ones(2, 2), torch.ones(8)[::2]])
def test_what_is_not_a_packed_buffer_is_refused(packed):
    with pytest.raises(ValueError, match="1-D and contiguous"):
        ring(local(), packed, what="test")
