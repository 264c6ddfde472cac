"""Native operations let other Python threads run, without which no deadline and no signal would be noticed."""

import sys
import threading

import pytest
import torch

from jointspar import ops

LENGTH = 20_000_000  # long enough for another thread to be seen meanwhile
NAMES = ("pack_gradients", "unpack_gradients", "add_packed", "squared_norms", "sgd_update", "lars_update")


@pytest.fixture
def no_forced_switches():
    """A thread then keeps Python's lock until it gives it up."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(before)


def operations():
    arrays = [torch.ones(LENGTH) for _ in range(3)]
    rates = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    return {
        "pack_gradients": lambda: ops.pack_gradients(arrays[:1], 2.0, out=arrays[1]),
        "unpack_gradients": lambda: ops.unpack_gradients(arrays[0], arrays[1:2]),
        "add_packed": lambda: ops.add_packed(arrays[0], arrays[1]),
        "squared_norms": lambda: ops.squared_norms(arrays),
        "sgd_update": lambda: ops.sgd_update(arrays[:1], arrays[1:2], arrays[2:], **rates),
        "lars_update": lambda: ops.lars_update(
            arrays[:1], arrays[1:2], arrays[2:], trust_coefficient=1e-3, eps=1e-8, **rates
        ),
    }


def is_seen_at_work(operation):
    """Whether this thread runs between the beginning and the end of an operation in another one."""
    begin, begun, ended, seen = threading.Event(), [], [], []

    def work():
        begin.wait()
        begun.append(True)
        operation()
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    begin.set()
    while not ended:
        seen += begun
        threading.Event().wait(1e-4)
    thread.join()
    return bool(seen)


@pytest.mark.usefixtures("no_forced_switches")
@pytest.mark.parametrize("name", NAMES)
def test_another_thread_runs_while_an_operation_does(name):
    operation = operations()[name]
    with ops.use_backend("native"):
        assert any(is_seen_at_work(operation) for _ in range(10))  # this thread may wake late on a busy machine


@pytest.mark.usefixtures("no_forced_switches")
def test_what_keeps_the_lock_is_told_apart():
    assert not any(is_seen_at_work(lambda: sum(range(1_000_000))) for _ in range(10))
