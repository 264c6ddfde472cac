"""What sampling layers saves in forward and backward: time of a ResNet-18 iteration, bytes that a transformer keeps.

    jointspar bench backward [--rounds 12]

Budgets alternate within one process in a new order each round, and times are the median of rounds, ratios of ratios
within a round, so that they hold although a shared machine drifts. The step itself (pack, exchange, update) is not part
of the time. Bytes are those of the distinct storages that autograd saves for the backward pass, parameters left out,
averaged over draws.
"""

from __future__ import annotations

import argparse
import operator
import random
import statistics
import time

import torch
from torch import nn

import jointspar as js
from jointspar.training.models import build_model

BUDGETS = (1.0, 0.5, 0.25)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small causal language model: 6 blocks of width 192."""

    def __init__(self, vocabulary: int = 512, width: int = 192, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 6) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens)))).flatten(0, 1)


def iterate(model: nn.Module, optimizer: js.JointSparSGD, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of one forward and backward; then a step at learning rate 0 draws the next layers."""
    optimizer.zero_grad()
    start = time.perf_counter()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    seconds = time.perf_counter() - start
    optimizer.step()
    return seconds


def optimizer_for(model: nn.Module, budget: float) -> js.JointSparSGD:
    sampling = js.Sampling(budget=budget, distribution="uniform")
    return js.JointSparSGD(model.named_parameters(), lr=0.0, sampling=sampling, comm=js.comm.local())


def time_resnet18(rounds: int) -> dict[float, list[float]]:
    """Seconds of forward and backward at each budget, batch 32 of 32x32: the mean of four iterations of each round."""
    torch.manual_seed(0)
    batch = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    pairs = {}
    for budget in BUDGETS:
        model = build_model("resnet18", in_channels=3, num_classes=10, image_size=32)
        pairs[budget] = (model, optimizer_for(model, budget))
    seconds: dict[float, list[float]] = {budget: [] for budget in BUDGETS}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for budget in order.sample(BUDGETS, len(BUDGETS)):
            elapsed = [iterate(*pairs[budget], batch) for _ in range(4)]
            if turn:
                seconds[budget].append(statistics.mean(elapsed))
    return seconds


def saved_bytes(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes of the distinct storages that one forward saves for backward, parameters and input left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch)}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return sum(storages.values())


def transformer_bytes(draws: int) -> dict[float, float]:
    """Mean bytes saved for backward at each budget, 4 sequences of 128 tokens."""
    torch.manual_seed(0)
    batch = torch.randint(0, 512, (4, 128)), torch.randint(0, 512, (512,))
    means = {}
    for budget in BUDGETS:
        model = Transformer()
        optimizer = optimizer_for(model, budget)
        counted = []
        for _ in range(draws):
            optimizer.zero_grad()
            counted.append(saved_bytes(model, batch))
            optimizer.step()
        means[budget] = statistics.mean(counted)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="jointspar bench backward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    seconds, saved = time_resnet18(rounds), transformer_bytes(4 * rounds)
    print(f"{'budget':>6}  {'resnet18 forward+backward':>26}  {'transformer, saved for backward':>32}")
    for budget in BUDGETS:
        milliseconds = 1e3 * statistics.median(seconds[budget])
        time_ratio = statistics.median(map(operator.truediv, seconds[budget], seconds[1.0]))
        byte_ratio = saved[budget] / saved[1.0]
        print(
            f"{budget:6.2f}  {milliseconds:12.1f} ms  {time_ratio:6.3f} x"
            f"  {saved[budget] / 2**20:18.2f} MiB  {byte_ratio:6.3f} x"
        )


if __name__ == "__main__":
    main()
