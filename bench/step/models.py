"""The models that are timed, each with a batch of its size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from jointspar.training.models import build_model

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs, labels of the cross entropy
NUM_CLASSES, VOCABULARY = 10, 512


class Case(NamedTuple):
    """A model and its batch on each rank. shape: of one image, or of one sequence of tokens."""

    model: str
    batch_size: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.model}, {self.batch_size} x {'x'.join(map(str, self.shape))}"


CASES = {
    "resnet18": Case("resnet18", 32, (3, 32, 32)),
    "resnet18-8": Case("resnet18", 8, (3, 32, 32)),  # a small local batch: more of a step is exchange
    "resnet50": Case("resnet50", 8, (3, 64, 64)),
    "transformer": Case("transformer", 4, (128,)),
    "resnet20": Case("resnet20", 64, (1, 28, 28)),  # as its loss curve is recorded
    "lenet5": Case("lenet5", 4, (3, 32, 32)),  # of --quick
}


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


def make_model(case: Case) -> nn.Module:
    """The same weights at every call; the global random state is left as it was."""
    if case.model == "transformer":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Transformer(VOCABULARY)
    return build_model(case.model, case.shape[0], NUM_CLASSES, case.shape[-1], seed=0)


def make_batch(case: Case, rank: int) -> Batch:
    """Random inputs and labels, others on each rank."""
    random = torch.Generator().manual_seed(rank + 1)
    size = (case.batch_size, *case.shape)
    if case.model == "transformer":
        tokens = torch.randint(VOCABULARY, (2, *size), generator=random)
        return tokens[0], tokens[1].flatten()
    return torch.randn(size, generator=random), torch.randint(NUM_CLASSES, size[:1], generator=random)
