"""The models that are timed, each with a batch of its size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from jointspar.training.models import build_model
from step.active_backward import Transformer

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
