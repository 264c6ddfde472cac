"""How long the messages of the own exchanges are."""

import pytest
import torch

from jointspar.step.exchange import ring, two_shot
from late_transport import on_threads


@pytest.mark.parametrize("exchange", [ring, two_shot])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_message_is_longer_than_asked_for_and_the_bits_are_those_of_long_messages(exchange, dtype, world_size):
    inputs = [
        torch.randn(50_001, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(world_size)
    ]
    longest = [0] * world_size

    def run(buffers, segment_bytes):
        def on_rank(transport):
            start_send = transport.start_send

            def noting(buffer, rank, *, what, tag=0):
                longest[transport.rank] = max(longest[transport.rank], buffer.numel() * buffer.element_size())
                return start_send(buffer, rank, what=what, tag=tag)

            transport.start_send = noting
            exchange(transport, buffers[transport.rank], what="test", segment_bytes=segment_bytes)

        on_threads(world_size, on_rank)
        return buffers

    long = run([row.clone() for row in inputs], None)
    assert max(longest) > 1024
    longest[:] = [0] * world_size
    short = run([row.clone() for row in inputs], 1024)
    assert 900 < max(longest) <= 1024
    assert all(torch.equal(a, b) for a, b in zip(long, short, strict=True))
