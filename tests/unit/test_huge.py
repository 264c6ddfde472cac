"""The program for sizes above 2^31, which people run by hand, holds for small ones."""

import runpy
from pathlib import Path

from jointspar.comm import run_simulated

PROGRAM = runpy.run_path(str(Path(__file__).parents[1] / "by_hand" / "huge.py"))


def test_operations():
    PROGRAM["try_ops"](5003)


def test_transports():
    def use(_):
        PROGRAM["try_bytes"](5003)
        PROGRAM["try_sum"](5003)

    run_simulated(3, use)
