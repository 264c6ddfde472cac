"""What every rank of a job that outlives its faults runs: FAULT_COUNT of each FAULT, from FAULT_SEED on."""

from __future__ import annotations

import os

import differences
import jointspar as js
import survivals
from small_training import Numbers


def inject_all() -> None:
    comm = js.comm.world()
    first = int(os.environ["FAULT_SEED"])
    for fault in os.environ["FAULT"].split():
        inject = getattr(differences, fault, None) or getattr(survivals, fault)
        for number in range(first, first + int(os.environ["FAULT_COUNT"])):
            print(f"INJECTED {fault} {number}\n", end="", flush=True)
            outcome = inject(Numbers(number), comm)
            print(f"OUTCOME {fault} {number} {outcome} on rank {comm.rank}\n", end="", flush=True)
    print(f"COMPLETE rank {comm.rank}\n", end="", flush=True)
