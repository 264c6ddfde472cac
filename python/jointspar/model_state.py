"""What a model's state is made of: tensors that are plain numbers in memory, some of them in several places at once."""

from __future__ import annotations

import torch


def why_not_plain(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being read as an array of numbers, said of it; None: nothing."""
    if torch.nn.parameter.is_lazy(tensor):
        return "has no shape yet: call the model once before"
    if tensor.is_nested:
        return "is nested"
    if tensor.layout != torch.strided:
        return f"is not dense ({tensor.layout})"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    return "has no values (it is on the meta device)" if tensor.is_meta else None


def each_once(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The elements without those that `expand` repeats: torch writes into no tensor that has any.

    like: an expanded tensor, of that shape, whose repetitions are left out instead. Without any, the tensor itself.
    """
    strides = (tensor if like is None else like).stride()
    if 0 not in strides:  # a view of an inference tensor could not be written
        return tensor
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]


def repeats_alike(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether `tensor`, of that shape, holds equal bytes wherever `like` holds one element more than once."""
    once = each_once(tensor, like)
    if once.shape == tensor.shape:
        return True
    first, every = (values.contiguous().view(torch.uint8) for values in (once.expand_as(tensor), tensor))
    return torch.equal(first, every)
