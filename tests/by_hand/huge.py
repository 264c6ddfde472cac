"""What has more than 2^31 elements or bytes, for real: tests elsewhere make the chunks small instead. By hand.

python tests/by_hand/huge.py ops                    # 9 GB
mpirun -n 2 python tests/by_hand/huge.py bytes      # 5 GB a rank
mpirun -n 2 python tests/by_hand/huge.py sum        # 9 GB a rank, or with what MPI adds 13; --elements for less
"""

from __future__ import annotations

import argparse
import time

import torch

import jointspar as js
from jointspar import ops

ELEMENTS = 2**31 + 5
PLACES = (0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, ELEMENTS - 1)  # around the ends of chunks, and where 32 bits end


def try_ops(num: int) -> None:
    """Packing, unpacking, adding and norms, of one tensor of bfloat16."""
    places = [place for place in PLACES if place < num]
    grad = torch.zeros(num, dtype=torch.bfloat16)
    grad[places] = torch.arange(1.0, len(places) + 1).bfloat16()
    packed, squared = ops.pack_gradients([grad], 2.0, wire_dtype="bfloat16")
    assert squared.tolist() == [sum(k * k for k in range(1, len(places) + 1))]
    assert packed[places].tolist() == [2.0 * k for k in range(1, len(places) + 1)]
    assert ops.squared_norms(packed, layout=[num]).tolist() == [4 * squared.item()]
    ops.add_packed(packed, grad)
    assert packed[places].tolist() == [3.0 * k for k in range(1, len(places) + 1)]
    ops.unpack_gradients(packed, [grad])
    assert torch.equal(grad, packed) and int(torch.count_nonzero(grad)) == len(places)


def try_bytes(num: int) -> None:
    """A broadcast, and a message to the next rank."""
    comm = js.comm.world()
    pattern = torch.arange(251, dtype=torch.uint8)
    expected = pattern.repeat(num // 251 + 1)[:num]
    buffer = expected.clone() if comm.rank == 0 else torch.zeros(num, dtype=torch.uint8)
    comm.broadcast(buffer, 0, what="huge broadcast")
    assert torch.equal(buffer, expected)
    buffer.zero_()
    receive = comm.start_receive(buffer, (comm.rank - 1) % comm.world_size, what="huge receive")
    send = comm.start_send(expected, (comm.rank + 1) % comm.world_size, what="huge send")
    send.wait()
    receive.wait()
    assert torch.equal(buffer, expected)


def try_sum(num: int) -> None:
    comm = js.comm.world()
    places = [place for place in PLACES if place < num]
    buffer = torch.ones(num)
    buffer[places] = torch.arange(len(places)) + 1.0 + comm.rank
    comm.allreduce(buffer, what="huge sum")
    size = comm.world_size
    assert buffer[places].tolist() == [size * (k + 1.0) + sum(range(size)) for k in range(len(places))]
    buffer[places] = float(size)
    assert (buffer == size).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["ops", "bytes", "sum"])
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    options = parser.parse_args()
    began = time.monotonic()
    {"ops": try_ops, "bytes": try_bytes, "sum": try_sum}[options.part](options.elements)
    print(f"{options.part}: {options.elements:,} elements are right, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
