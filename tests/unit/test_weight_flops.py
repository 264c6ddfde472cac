"""count_flops against torch's FlopCounterMode on backward passes with and without each layer's weights, or by hand."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import jointspar as js
from jointspar.errors import JointSparError

F = nn.functional


def counted(model, *inputs):
    """{layer name: what count_flops found}"""
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.1)
    optimizer.count_flops(model, *inputs)
    optimizer.release()
    return dict(zip((layer.name for layer in optimizer.layers), optimizer._pipeline.flops.tolist(), strict=True))


def backward_flops(model, frozen, inputs):
    """Of one backward pass, which goes down to the inputs, without the gradients of the frozen parameters."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    output = model(*inputs)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    return counter.get_total_flops()


def saved(model, *inputs):
    """{layer name: FLOPs that backward saves without the gradients of its parameters}"""
    names = [name for name, _ in model.named_parameters()]
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.1)
    frozen = {layer.name: {names[position] for position in layer.parameters} for layer in optimizer.layers}
    optimizer.release()
    whole = backward_flops(model, (), inputs)
    return {layer: whole - backward_flops(model, some, inputs) for layer, some in frozen.items()}


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **settings)
    is_nested = not settings.get("norm_first", False)  # torch's faster way in evaluation
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=is_nested)
    return nn.Sequential(nn.Linear(16, 16), stack, nn.Linear(16, 4))


class WithTable(nn.Module):
    """Attention with a table that is added to the scores, as in Swin."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("index", torch.randint(0, 6, (6, 6)))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) + self.table + self.table[0][self.index]
        return self.out(torch.softmax(scores, -1) @ v)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding.weight[:6] * x))


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **settings)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0] + self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.recurrent, self.head = kind(16, 8, **settings), nn.LazyLinear(3)
        self.double()(torch.randn(2, 6, 16, dtype=torch.float64))

    def forward(self, x):
        return self.head(self.recurrent(x.double())[0])


class Root(nn.Module):
    """One parameter, used as a function says."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight, self.use, self.before = nn.Parameter(torch.randn(shape)), use, nn.Linear(16, 16)

    def forward(self, x):
        return self.use(self.before(x), self.weight)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ (weight + 0).t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return grad @ weight if needs_x else None, (grad.flatten(0, 1).T @ x.flatten(0, 1)) if needs_weight else None


class Codebook(nn.Module):
    """What is nearest is not differentiable, nor is what a model computes beside what it returns."""

    def __init__(self):
        super().__init__()
        self.codes, self.head, self.beside = nn.Parameter(torch.randn(7, 16)), nn.Linear(16, 4), nn.Linear(4, 4)

    def forward(self, x):
        nearest = self.codes[(x @ self.codes.t()).argmax(-1)]
        output = self.head(x + (nearest - x).detach() + nearest.relu())
        self.seen = self.beside(output).detach()
        return output


class Gated(nn.Module):
    """The weight is scaled by a parameter of a layer that is always active, so that its gradient is always made."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight * self.norm.weight)


class Kept(nn.Linear):
    """Writes to its weight, with what comes from the data, and frozen parameters beside it."""

    def __init__(self):
        super().__init__(16, 16)
        self.scale = nn.Parameter(torch.ones(16), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(x.sum().sign() ** 2)
        held = torch.zeros(2, 6, 16)
        held += x
        held[0] *= self.scale
        return F.linear(held, self.weight * self.scale)


class LowRank(nn.Module):
    """A frozen weight to which the product of two matrices is added, before it is used."""

    def __init__(self):
        super().__init__()
        self.base, self.low = nn.Linear(16, 16), nn.Linear(16, 2)
        self.high = nn.Parameter(torch.randn(16, 2))
        self.factors = nn.ParameterList([torch.randn(16, 3), torch.randn(3, 16)])
        self.base.requires_grad_(False)

    def forward(self, x):
        weight = self.base.weight + self.factors[0] @ self.factors[1]
        return F.linear(x, weight) + F.linear(x, self.high @ self.low.weight)


class Queries(nn.Module):
    """What is learned goes through layers before it meets the data."""

    def __init__(self):
        super().__init__()
        self.queries, self.project, self.key = nn.Embedding(5, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.position, self.start = nn.Embedding(6, 16), nn.Parameter(torch.randn(6, 16))

    def forward(self, x):
        x = x + self.position(torch.arange(6))
        canvas = torch.zeros_like(self.start).expand(2, 6, 16).contiguous()
        canvas[:, 1:] = x[:, 1:]
        queries = self.project(self.project(self.queries.weight)).expand(2, 5, 16)
        return F.scaled_dot_product_attention(queries, self.key(canvas + self.start), x)


class Repeated(nn.Module):
    def __init__(self, is_checkpointed):
        super().__init__()
        self.once, self.twice, self.never = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.is_checkpointed = is_checkpointed

    def forward(self, x):
        twice = self.twice
        x = checkpoint(twice, self.once(x), use_reentrant=False) if self.is_checkpointed else twice(self.once(x))
        return twice(x.relu())


def split_in_three(x, weight):
    return sum(F.linear(x, part) for part in weight.split(16)) + F.linear(x, weight.chunk(3)[1])


def detached(x, weight):
    with torch.no_grad():
        fixed = weight * 2
    return (x @ weight.detach()) @ fixed + x @ (weight + (fixed - weight).detach())


SEQUENCE, IMAGE = (2, 6, 16), (2, 4, 10, 10)
MODELS = {
    "encoder": (encoder, SEQUENCE),
    "encoder_norm_first": (lambda: encoder(norm_first=True), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "attention_kdim": (lambda: Attention(kdim=16, vdim=16, bias=False), SEQUENCE),
    "attention_bias_kv": (lambda: Attention(add_bias_kv=True), SEQUENCE),
    "table": (WithTable, SEQUENCE),
    "tied": (Tied, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE),
    "lstm_projected": (lambda: Recurrent(nn.LSTM, proj_size=3), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, dilation=2), nn.Conv2d(8, 4, (1, 2))), IMAGE),
    "conv_transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2), nn.Conv2d(8, 2, 3)), IMAGE),
    "conv1d_same": (lambda: nn.Conv1d(6, 5, 3, padding="same"), SEQUENCE),
    "conv3d_unbatched": (lambda: nn.Conv3d(2, 3, 2), IMAGE),
    "conv_norm": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.0)), IMAGE),
    "einsum": (lambda: Root(lambda x, w: torch.einsum("bsi,hio->bhso", x, w), 3, 16, 4), SEQUENCE),
    "mm": (lambda: Root(lambda x, w: torch.mm(x.flatten(0, 1), w.t()), 5, 16), SEQUENCE),
    "addmm": (lambda: Root(lambda x, w: torch.addmm(w[0], x[0], w), 16, 16), SEQUENCE),
    "addmm_self": (lambda: Root(lambda x, w: torch.addmm(w, x[0], x[1].t()), 6, 6), SEQUENCE),
    "bmm_expanded": (lambda: Root(lambda x, w: torch.bmm(x, w.expand(2, 16, 4)), 16, 4), SEQUENCE),
    "bmm_own": (lambda: Root(lambda x, w: torch.bmm(w.view(2, 4, 6), x), 2, 24), SEQUENCE),
    "baddbmm": (lambda: Root(lambda x, w: torch.baddbmm(w[:, :6, :4], x, w), 2, 16, 4), SEQUENCE),
    "matmul_folded": (lambda: Root(lambda x, w: w @ x, 5, 6), SEQUENCE),
    "split": (lambda: Root(split_in_three, 48, 16), SEQUENCE),
    "cast": (lambda: Root(lambda x, w: x.bfloat16() @ w.bfloat16(), 16, 8), SEQUENCE),
    "elementwise": (lambda: Root(lambda x, w: (x @ x.transpose(1, 2)) * w, 6, 6), SEQUENCE),
    "dynamic": (lambda: Root(lambda x, w: x @ (w * x.mean((0, 1))), 16, 16), SEQUENCE),
    "masked": (lambda: Root(lambda x, w: x @ (w * torch.ones(16, 16).tril()), 16, 16), SEQUENCE),
    "rounded": (lambda: Root(lambda x, w: x @ Rounded.apply(w), 16, 16), SEQUENCE),
    "own_linear": (lambda: Root(OwnLinear.apply, 16, 16), SEQUENCE),
    "detached": (lambda: Root(detached, 16, 16), SEQUENCE),
    "low_rank": (LowRank, SEQUENCE),
    "queries": (Queries, SEQUENCE),
    "twice": (lambda: Repeated(False), SEQUENCE),
    "checkpointed": (lambda: Repeated(True), SEQUENCE),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 5)), SEQUENCE),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 5)), SEQUENCE),
    "gated_by_norm": (Gated, SEQUENCE),
    "codebook": (Codebook, SEQUENCE),
    "kept": (Kept, SEQUENCE),
    "vmap": (lambda: Root(lambda x, w: torch.func.vmap(lambda one: x @ one)(w), 3, 16, 4), SEQUENCE),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_has_what_backward_saves_without_its_weights(name, mode):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, x = build().train(mode == "train"), torch.randn(shape)
    expected = saved(model, x)
    with torch.no_grad():
        assert counted(model, x) == expected


def test_the_models_above_have_something_to_save():
    torch.manual_seed(0)
    assert saved(encoder(), torch.randn(SEQUENCE))["1.layers.1.linear1"] == 2 * 12 * 16 * 32
    assert saved(Attention(), torch.randn(SEQUENCE))["attention"] == 2 * (2 * 12 * 16 * 48)
    assert saved(WithTable(), torch.randn(SEQUENCE)) == {"(root)": 0, "qkv": 2 * 12 * 16 * 48, "out": 2 * 12 * 16 * 16}


def test_a_grouped_convolution_has_its_group_s_products_alone():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2, groups=2))
    per_weight = [2 * 2 * 8 * 8, 2 * 2 * 6 * 6, 2 * 2 * 6 * 6]  # two each, images, and where the filter is laid
    by_hand = [count * size for count, size in zip(per_weight, [8 * 4 * 9, 8 * 2 * 9, 8 * 2 * 4], strict=True)]
    assert list(counted(model, torch.randn(IMAGE)).values()) == by_hand


def test_a_frozen_factor_of_another_module_shares_nothing():
    model = Gated()
    model.norm.requires_grad_(False)
    assert counted(model, torch.randn(SEQUENCE)) == {"linear": 2 * 12 * 16 * 16}


def test_a_model_may_keep_its_loss_to_itself():
    class Own(nn.Linear):
        def forward(self, x):
            self.loss = super().forward(x).sum()
            return self.loss.item()

    assert counted(Own(16, 4), torch.randn(SEQUENCE)) == {"(root)": 2 * 12 * 16 * 4}


def test_looking_up_takes_no_product_and_activations_behind_it_are_not_its_own():
    model = nn.Sequential(nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.Linear(4, 3))
    by_hand = [0, 2 * 12 * 16 * 4, 2 * 12 * 4 * 3]
    assert list(counted(model, torch.randint(0, 9, (2, 6))).values()) == by_hand


def test_a_bilinear_layer_has_its_products_which_torch_does_not_count():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.pairs, self.left = nn.Bilinear(4, 5, 3), nn.Linear(16, 4)

        def forward(self, x):
            return self.pairs(self.left(x), x[..., :5])

    assert counted(Pairs(), torch.randn(SEQUENCE)) == {"pairs": 2 * 12 * 3 * 4 * 5, "left": 2 * 12 * 16 * 4}


def test_a_fused_recurrent_layer_has_the_products_of_its_matrices():
    """cuDNN's, which this gives a stand-in on the CPU; the CPU's own makes all gradients, wanted or not."""

    def stand_in(x, weights, *_):
        return x.new_zeros(6, 2, 3), *(x.new_zeros(1) for _ in range(4))

    class Fused(nn.LSTM):
        def forward(self, x):
            h, c = torch.zeros(1, 2, 3), torch.zeros(1, 2, 8)
            layout = (2, 8, 3, 1, False, 0.0, True, False, [], None)
            return torch.ops.aten._cudnn_rnn(x, self._flat_weights, 5, None, h, c, *layout)[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cudnn_rnn", stand_in, "CPU")
        flops = counted(Fused(4, 8, proj_size=3), torch.randn(6, 2, 4))
    assert flops == {"(root)": 2 * 12 * (32 * 4 + 32 * 3 + 3 * 8)}
    assert counted(nn.LSTM(4, 8), torch.randn(6, 2, 4)) == {"(root)": 0}


@dataclasses.dataclass
class Batch:
    """Not among torch's containers, and in a circle."""

    x: object
    models: tuple = (nn.Module, nn, nn.Linear(16, 4))
    itself: object = None


def in_circle(x):
    batch = Batch({"x": [x]})
    batch.itself = batch
    return batch


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [(lambda x: x, lambda x: x), ((lambda x: [(0, {"x": x})]), (lambda x: x[0][1]["x"])),
     (in_circle, lambda batch: batch.x["x"][0])],
    ids=["plain", "list", "object"],
)  # fmt: skip
@pytest.mark.parametrize("is_packed", [False, True], ids=["tensor", "packed"])
def test_data_are_found_wherever_they_are_in_the_inputs(wrap, unwrap, is_packed):
    """Else the states of a recurrent layer would seem computed from its weights alone, their gradients its own."""

    class Unwrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(16, 8).double()

        def forward(self, given):
            return self.rnn(unwrap(given))

    x = torch.randn(6, 2, 16, dtype=torch.float64)
    lengths = [6, 4] if is_packed else [6, 6]
    given = pack_padded_sequence(x, torch.tensor(lengths)) if is_packed else x
    assert counted(Unwrap(), wrap(given)) == {"rnn": 2 * sum(lengths) * 24 * (16 + 8)}


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_counted_by_their_elements(layout):
    model = nn.Linear(16, 4)
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=layout)
    assert counted(model, nested) == {"(root)": 2 * 8 * 16 * 4}


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_are_counted(wrap):
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert list(counted(wrap(model), torch.randn(5, 16)).values()) == [2 * 5 * 16 * 8, 2 * 5 * 8 * 3]


def make_restless():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(512, 8))
    body[4] = parametrizations.spectral_norm(body[4])
    return nn.Sequential(body, nn.Linear(8, 3), nn.Linear(3, 2)).train()


def test_counting_changes_nothing():
    model, x = make_restless(), torch.randn(IMAGE)
    model[1].requires_grad_(False)
    model[0][1].eval()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=1))
    loss = model(x).sum()

    def state():
        tensors = [*model.parameters(), *model.buffers()]
        kept = [tensor.detach().clone() for tensor in (*tensors, torch.get_rng_state())]
        modes = [module.training for module in model.modules()]
        return kept, [(id(t), t._version, t.requires_grad, t.grad) for t in (*tensors, x)], modes

    before = state()
    optimizer.count_flops(model, x)
    after = state()
    assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    loss.backward()


def test_modules_that_share_a_buffer_share_its_copy():
    class Sharing(nn.Linear):
        def forward(self, x):
            self.seen.add_(1)
            assert self.inner.seen is self.seen
            return super().forward(x)

    model = Sharing(16, 4)
    model.inner = nn.Module()
    model.register_buffer("seen", torch.zeros(()))
    model.inner.register_buffer("seen", model.seen)
    counted(model, torch.randn(SEQUENCE))
    assert model.inner.seen is model.seen and model.seen == 0


def test_a_failing_forward_leaves_nothing_behind():
    model = make_restless()
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=1))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    buffers = [(id(buffer), buffer.clone()) for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match="channels"):
        optimizer.count_flops(model, torch.randn(2, 3, 10, 10))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for (identity, value), buffer in zip(buffers, model.buffers(), strict=True):
        assert identity == id(buffer) and torch.equal(value, buffer)
    assert optimizer._pipeline.flops is None and torch.is_autocast_cache_enabled()


def test_what_is_inactive_or_frozen_is_counted_as_well():
    model, x = make_restless(), torch.randn(IMAGE)
    by_hand = [2 * 2 * 64 * 8 * 36, 2 * 2 * 512 * 8, 2 * 2 * 8 * 3, 2 * 2 * 3 * 2]
    model[1].requires_grad_(False)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=1))
    assert not all(parameter.requires_grad for parameter in model.parameters())
    for grad_mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        optimizer._pipeline.flops = None
        with grad_mode():
            optimizer.count_flops(model, x)
        assert optimizer._pipeline.flops.tolist() == by_hand


def test_under_autocast_neither_its_cache_is_used_nor_filled():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), torch.randn(SEQUENCE)
    optimizer = js.JointSparSGD(model.named_parameters(), sampling=js.Sampling(budget=1))
    idle = int((~optimizer.active).nonzero()[0])
    for is_warm in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if is_warm:
                model(x)
            optimizer.count_flops(model, x)
            output = model(x)
        output.sum().backward()
        assert model[idle].weight.grad is None
        assert optimizer._pipeline.flops.tolist() == [2 * 12 * 16 * 16, 2 * 12 * 16 * 4]


def test_a_forward_may_differentiate():
    class Force(nn.Sequential):
        def forward(self, x):
            x = x.requires_grad_()
            return torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)[0]

    force = Force(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
    assert counted(force, torch.randn(SEQUENCE))["0"] > 0
    assert all(parameter.grad is None for parameter in force.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_counted_is_refused_by_name():
    model = nn.Linear(16, 4)
    optimizer = js.JointSparSGD(model.named_parameters())
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        optimizer.count_flops(lambda x: model(x), torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"model: its forward uses none of this optimizer's parameters"):
        optimizer.count_flops(copy.deepcopy(model), torch.randn(3, 16))
    with pytest.raises(TypeError, match="input"):
        optimizer.count_flops(model)
    with pytest.raises(JointSparError, match=r"count_flops: torch\.jit hides its products; pass the module"):
        optimizer.count_flops(torch.jit.script(model), torch.randn(3, 16))

    class Branches(nn.Linear):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: F.linear(x, self.weight), lambda x: x[:, :4].clone(), (x,))

    branches = Branches(16, 4)
    with pytest.raises(JointSparError, match="count_flops: torch's cond hides"):
        js.JointSparSGD(branches.named_parameters()).count_flops(branches, torch.randn(3, 16))
    assert optimizer.stats.weight_grad_flops_skipped is None
