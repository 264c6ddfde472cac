"""Exchanging through another buffer, and waiting with a deadline; on the CPU, where the copies are the same."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from jointspar.comm.device import call_with_deadline, wait_for_stream
from jointspar.comm.local import local
from jointspar.errors import CollectiveTimeout, JointSparError
from jointspar.step.exchange.allreduce import allreduce
from jointspar.step.exchange.staged import Staged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_exchange_gets_another_buffer_and_its_sum_comes_back(dtype):
    seen = []

    def double(transport, packed, *, what, slices=None):
        seen.append((packed.data_ptr(), packed.dtype, packed.numel(), what, slices))
        packed.mul_(2)

    staged = Staged(double)
    for numel in (5, 3, 0, 9):
        packed = torch.arange(numel).to(dtype)
        staged(local(), packed, what="a step", slices="these")
        assert torch.equal(packed, 2 * torch.arange(numel).to(dtype))
        pointer, *rest = seen[-1]
        assert rest == [dtype, numel, "a step", "these"]
        assert pointer != packed.data_ptr() or numel == 0


def test_its_buffer_is_kept_and_grows_only():
    pointers = []
    staged = Staged(lambda transport, packed, *, what, slices=None: pointers.append(packed.data_ptr()))
    for numel in (100, 50, 100, 1):
        staged(local(), torch.zeros(numel), what="a step")
    assert len(set(pointers)) == 1


def test_a_blocking_call_returns_or_raises_as_it_would():
    done = []
    call_with_deadline(local(), lambda: done.append(1), what="a sum")
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        call_with_deadline(local(), lambda: done.append(1 // 0), what="a sum")


def test_a_blocking_call_that_does_not_return_times_out_and_closes_the_transport():
    transport = local()
    transport.timeout = 0.1
    with pytest.raises(CollectiveTimeout, match=r"rank 0: a sum: no answer from the other ranks for 0\.1 s"):
        call_with_deadline(transport, lambda: time.sleep(5), what="a sum")
    with pytest.raises(JointSparError, match="a sum"):
        transport.allreduce(torch.zeros(1), what="the next")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_during_a_blocking_call_closes_the_transport():
    transport, is_left = local(), threading.Event()

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        is_left.wait(10)

    with pytest.raises(KeyboardInterrupt):
        call_with_deadline(transport, call, what="a sum")
    is_left.set()
    with pytest.raises(JointSparError, match="a sum was left by KeyboardInterrupt"):
        transport.allreduce(torch.zeros(1), what="the next")


def test_an_interrupt_in_the_transports_own_sum_closes_it_and_a_refusal_does_not(monkeypatch):
    transport = local()

    def raises(error):
        def fail(packed, *, what):
            raise error

        monkeypatch.setattr(transport, "allreduce", fail)
        with pytest.raises(type(error)):
            allreduce(transport, torch.zeros(1), what="a sum")
        monkeypatch.undo()

    raises(TypeError())
    transport.allreduce(torch.zeros(1), what="the next")
    raises(KeyboardInterrupt())
    with pytest.raises(JointSparError, match="a sum was left by KeyboardInterrupt"):
        transport.allreduce(torch.zeros(1), what="the next")


def test_the_cpu_is_not_waited_for():
    wait_for_stream(local(), torch.device("cpu"), what="a step")
