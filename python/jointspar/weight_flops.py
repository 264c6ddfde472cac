"""What weight gradients cost: the products of one forward in which the parameters of a layer take part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from jointspar.arguments import check_kind
from jointspar.errors import JointSparError

aten = torch.ops.aten
Factors = tuple[Sequence[torch.Tensor], Callable[[torch.Tensor], int]]

# Stands among a tensor's layers where backward makes the tensor's gradient whichever of them are inactive.
ALWAYS = -1


def weight_grad_flops(model: torch.nn.Module, layers: Sequence[Sequence[torch.Tensor]], *inputs: Any) -> np.ndarray:
    """FLOPs of each layer's weight gradients for these inputs, int64 [num_layers].

    They are what backward saves where the layer's parameters need no gradient, gradients of activations apart. The
    gradient of a factor takes as many multiplications as the product itself, so that one forward tells them: in the
    mode that the model is in, with gradients enabled, since torch fuses products where there are none. It leaves
    buffers, flags and torch's random state as they were.

    A multiplication and an addition are two FLOPs, as in torch's FlopCounterMode. Counted are products of two matrices,
    convolutions, nn.Bilinear and recurrent layers, but not the CPU's fused LSTM, whose backward makes all gradients,
    wanted or not, nor products with a vector, of which spectral_norm makes some without a gradient. A factor that
    several layers share (their sum, say) counts for none of them, as its gradient is saved only where all are inactive.
    The loss is taken to depend on all that the model returns.

    Args:
        layers: the tensors of each layer.

    Raises: TypeError where model is no module, ValueError where its forward uses no tensor of any layer, JointSparError
    where torch hides the products inside: in modules of torch.jit, and in control flow like torch.cond.
    """
    check_kind("model", model, "a torch.nn.Module", isinstance(model, torch.nn.Module))
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise JointSparError("count_flops: torch.jit hides its products; pass the module that was compiled")
    tensors = [tensor for layer in layers for tensor in layer]
    own = {id(tensor) for tensor in tensors}
    others = [tensor for tensor in model.parameters() if tensor.requires_grad and id(tensor) not in own]
    data = list(_tensors_in(inputs))
    counter = _Products(layers, [*others, *data])
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *data)}
    with _left_as_found(tensors, devices), _copied_buffers(model):
        with counter:
            outputs = model(*inputs)
        flops = counter.total(outputs)
    if not counter.uses_layers:
        raise ValueError("model: its forward uses none of this optimizer's parameters")
    return flops


class _Products(TorchDispatchMode):
    """Follows which layers every tensor of a forward is computed from, and counts products of those from one alone.

    What is computed from data has ALWAYS among its layers: it is an activation, whose gradient others need. What comes
    from nowhere (masks, positions, buffers) has no layers, and makes of a weight no activation.
    """

    supports_higher_order_operators = True

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]], always: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.uses_layers = False
        self._num_layers = len(layers)
        self._found: list[tuple[int, int, Any]] = []  # layer, FLOPs, node of autograd
        self._last: tuple[torch.Tensor, list[tuple[int, int]]] | None = None  # output; layer and FLOPs by factor
        self._layers_of = WeakIdKeyDictionary()  # tensor -> frozenset of positions in layers
        self._leaves = {id(tensor) for layer in layers for tensor in layer}
        for tensor in always:
            self._layers_of[tensor] = frozenset([ALWAYS])
        for index, layer in enumerate(layers):
            for tensor in layer:
                self._layers_of[tensor] = frozenset([index])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._settle()
        if not isinstance(func, torch._ops.OpOverload) and "flex_attention" not in func.name():
            raise JointSparError(f"count_flops: torch's {func.name()} hides which products are in it")
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        layers = frozenset[int]().union(*map(self._find, _tensors_in((args, kwargs))))
        self.uses_layers |= bool(layers - {ALWAYS})
        rule = RULES.get(getattr(func, "overloadpacket", None))
        if rule is not None:
            self._last = next(_tensors_in(output)), self._factors(*rule(args, output))
        for result in _tensors_in(output):
            self._note(result, layers)
        return output

    def total(self, outputs: Any) -> np.ndarray:
        """FLOPs by layer, of the products that a gradient of the outputs comes to; int64 [num_layers]."""
        self._settle()
        reached = _nodes_behind(_tensors_in(outputs))
        flops = np.zeros(self._num_layers, dtype=np.int64)
        for layer, count, node in self._found:
            if node is None or node in reached or not reached:  # nothing reached: the model keeps its loss to itself
                flops[layer] += count
        return flops

    def _find(self, tensor: torch.Tensor) -> frozenset[int]:
        found: frozenset[int] = self._layers_of.get(tensor, frozenset())
        return found

    def _note(self, result: torch.Tensor, layers: frozenset[int]) -> None:
        """Where an operation wrote to a view, what it is a view of has changed, too."""
        for tensor in (result, result._base):
            if tensor is not None and layers and id(tensor) not in self._leaves:
                self._layers_of[tensor] = self._find(tensor) | layers

    def _factors(
        self, factors: Sequence[torch.Tensor], flops_of: Callable[[torch.Tensor], int]
    ) -> list[tuple[int, int]]:
        """Layer and FLOPs of those that come from one layer alone and get a gradient."""
        # An autograd.Function's forward has gradients disabled and still has a backward; else a flag tells.
        is_inside = not torch.is_grad_enabled()
        mine = [(self._find(factor), flops_of(factor)) for factor in factors if factor.requires_grad or is_inside]
        return [(min(layers), count) for layers, count in mine if len(layers) == 1 and ALWAYS not in layers]

    def _settle(self) -> None:
        """Autograd gives a product its node after it was dispatched, so that one looks when the next operation comes.

        Inside an autograd.Function there is none.
        """
        if self._last is not None:
            output, factors = self._last
            self._found += [(layer, count, output.grad_fn) for layer, count in factors]
            self._last = None


def _nodes_behind(outputs: Iterable[torch.Tensor]) -> set[Any]:
    """All nodes of autograd that a backward pass from these tensors comes to."""
    found, seen = [output.grad_fn for output in outputs], set[Any]()
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [following for following, _ in node.next_functions]
    return seen


# Rules: an operation's arguments and output -> its factors, and what the gradient of one takes ----------------------


def _matrix_product(args: Sequence[Any], output: torch.Tensor) -> Factors:
    left, right = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]  # before them stands what is added
    return (left, right), lambda _: 2 * output.numel() * left.shape[-1]


def _linear(args: Sequence[Any], _: torch.Tensor) -> Factors:
    """Of nested tensors; others come as matrix products."""
    x, weight = args[:2]
    return (x, weight), lambda _: 2 * x.numel() * weight.shape[0]


def _convolution(args: Sequence[Any], output: torch.Tensor) -> Factors:
    """Each weight is used wherever its filter is laid: at every output, or, transposed, at every input."""
    x, weight, is_transposed = args[0], args[1], args[6]
    positions = x if is_transposed else output
    count = positions.shape[0] * math.prod(positions.shape[2:])
    return (x, weight), lambda _: 2 * count * weight.numel()


def _trilinear(args: Sequence[Any], _: torch.Tensor) -> Factors:
    """Three factors, which get new dimensions and are then multiplied element by element (and summed)."""
    shapes = [list(factor.shape) for factor in args[:3]]
    for shape, new_dims in zip(shapes, args[3:6], strict=True):
        for dim in sorted(new_dims):
            shape.insert(dim, 1)
    return args[:3], lambda _: 2 * math.prod(np.broadcast_shapes(*map(tuple, shapes)))


def _recurrent(args: Sequence[Any], _: Any) -> Factors:
    """All steps of all layers at once; its matrices are multiplied with a vector for each step of each sequence."""
    x, weights = args[:2]
    count = math.prod(x.shape[:-1])
    return [weight for weight in weights if weight.ndim == 2], lambda weight: 2 * count * weight.numel()


RULES: dict[Any, Callable[[Sequence[Any], Any], Factors]] = {
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _matrix_product),
    aten.linear: _linear,
    aten.convolution: _convolution,
    aten._trilinear: _trilinear,
    **dict.fromkeys((aten._cudnn_rnn, aten.miopen_rnn), _recurrent),
}


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in containers and in attributes of objects (packed sequences, data classes)."""
    found, seen = [value], set[int]()
    while found:
        item = found.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif not isinstance(item, (type, ModuleType, torch.nn.Module)) and id(item) not in seen:
            seen.add(id(item))
            parts = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple, set)) else ()
            found += [*parts, *getattr(item, "__dict__", {}).values()]


@contextmanager
def _left_as_found(tensors: Sequence[torch.Tensor], devices: Iterable[torch.device]) -> Iterator[None]:
    """Differentiable tensors, inactive or not, whatever the caller disabled; flags and random state come back."""
    flags = [tensor.requires_grad for tensor in tensors]
    caches = torch.is_autocast_cache_enabled()
    gpus = [device.index for device in devices if device.type == "cuda"]
    try:
        torch.set_autocast_cache_enabled(False)  # its casts of weights are not seen here, and ours would be kept there
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(gpus):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)


@contextmanager
def _copied_buffers(model: torch.nn.Module) -> Iterator[None]:
    """The model writes to copies of its buffers, so that a graph that holds them stays valid."""
    buffers = [(module, *item) for module in model.modules() for item in module.named_buffers(recurse=False)]
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}  # one for all modules that share it
    try:
        for module, name, buffer in buffers:
            setattr(module, name, copies[id(buffer)])
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
