"""Tensors that torch.save takes, but not a checkpoint or a mean: kept bit for bit, or refused by all ranks alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import jointspar as js
from jointspar.checkpoint_files import _sealed
from jointspar.comm import run_simulated
from jointspar.errors import CheckpointError, DesyncError
from jointspar.files import sha256

ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "is not dense .torch.sparse_coo"),
    "rows": (lambda: torch.eye(4).to_sparse_csr(), "is not dense .torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "is nested",
    ),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "is quantized"),
    "meta": (lambda: torch.ones(3, device="meta"), "has no values"),
    "complex32": (lambda: torch.ones(3, dtype=torch.complex32), "is of torch.complex32"),
}
KEPT: dict[str, Callable[[], torch.Tensor]] = {
    "complex64": lambda: torch.randn(3, dtype=torch.complex64),
    "complex128": lambda: torch.randn(2, 3, dtype=torch.complex128),
    "complex128 of no dimension": lambda: torch.randn((), dtype=torch.complex128),
    "complex128, none": lambda: torch.randn(0, 2, dtype=torch.complex128),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex128).conj(),
    "transposed": lambda: torch.randn(2, 3).t(),
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "expanded twice": lambda: torch.randn(2, 1, 1).expand(2, 3, 4),
    "expanded NaN": lambda: torch.tensor(math.nan).expand(2),
    "expanded complex": lambda: torch.randn(1, 3, dtype=torch.complex128).expand(2, 3),
    "expanded float8": lambda: torch.randn(1, 3).to(torch.float8_e4m3fn).expand(2, 3),
    "expanded to none": lambda: torch.randn(1, 3).expand(0, 3),
    "made in inference": lambda: torch.inference_mode()(torch.randn)(3),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(ComplexHalf|nested tensors|Sparse CSR|quantized tensor creation)"),
    pytest.mark.timeout(60),
]


def make(buffer: torch.Tensor, seed: int = 0) -> tuple[nn.Module, js.JointSparSGD]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    optimizer = js.JointSparSGD(model.named_parameters(), lr=0.1)
    model.register_buffer("odd", buffer)
    return model, optimizer


def contents(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    own = torch.stack([tensor.real, tensor.imag]) if tensor.is_complex() else tensor
    return tensor.dtype, tensor.shape, own.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("kind", ODD)
def test_a_buffer_that_no_file_holds_is_refused_by_name_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    buffer, message = ODD[kind]
    model, optimizer = make(buffer())
    with pytest.raises(TypeError, match=f"'odd' of its state {message}"):
        js.checkpoint.save(tmp_path / "new", model=model, optimizer=optimizer)
    assert not (tmp_path / "new").exists()


def test_buffers_without_a_shape_are_refused_by_name(tmp_path: Path) -> None:
    def use(transport: js.comm.Transport) -> None:
        model, optimizer = make(torch.ones(1))
        model.add_module("norm", nn.LazyBatchNorm1d(affine=False))
        with pytest.raises(TypeError, match=r"'norm\.running_mean' of its state has no shape yet"):
            js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
        with pytest.raises(TypeError, match=r"buffer 'norm\.running_mean' has no shape yet"):
            js.sync_buffers(model)

    run_simulated(2, use)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("odd_rank", [0, 1])
def test_where_one_rank_cannot_save_none_does_and_all_go_on(tmp_path: Path, kind: str, odd_rank: int) -> None:
    def use(transport: js.comm.Transport) -> tuple[str, str]:
        model, optimizer = make(ODD[kind][0]() if transport.rank == odd_rank else torch.zeros(2))
        with pytest.raises((TypeError, CheckpointError)) as refused:
            js.checkpoint.save(tmp_path / "new", model=model, optimizer=optimizer)
        assert not (tmp_path / "new").exists()
        model.odd = torch.ones(2)
        assert js.checkpoint.save(tmp_path / "new", model=model, optimizer=optimizer).is_dir()
        return refused.type.__name__, str(refused.value)

    said = run_simulated(2, use)
    (its_kind, its_own), (others_kind, others) = said[odd_rank], said[1 - odd_rank]
    assert (its_kind, others_kind) == ("TypeError", "CheckpointError")
    assert "'odd'" in its_own and others == f"rank {odd_rank} cannot save: {its_own}"


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    """As where each host has a disk of its own."""

    def use(transport: js.comm.Transport) -> None:
        model, optimizer = make(torch.zeros(2))
        js.checkpoint.save(tmp_path / str(transport.rank), model=model, optimizer=optimizer)

    with pytest.raises(
        CheckpointError, match=r"1/\.partial-step-00000000: rank 1 does not see the folder.*one file system"
    ):
        run_simulated(2, use)


def test_other_reasons_not_to_save_are_told_to_all_ranks_too(tmp_path: Path) -> None:
    long = "\N{SNOWMAN}\ud800" * 400

    def use(transport: js.comm.Transport) -> str:
        model, optimizer = make(torch.zeros(1))
        extra = {"it": object()} if transport.rank == 2 else {}
        with pytest.raises((TypeError, CheckpointError)) as refused:
            js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, extra=extra)

        class Failing:
            def state_dict(self) -> None:
                raise OSError(long)

        scheduler = Failing() if transport.rank == 1 else None
        with pytest.raises(OSError if transport.rank == 1 else CheckpointError):
            js.checkpoint.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
        return str(refused.value)

    said = run_simulated(3, use)
    assert said[0] == said[1] == f"rank 2 cannot save: {said[2]}" and "object cannot be saved" in said[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KEPT)
def test_a_buffer_comes_back_with_all_its_bits(tmp_path: Path, kind: str) -> None:
    model, optimizer = make(KEPT[kind]())
    saved = contents(model.odd)
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    other, other_optimizer = make(KEPT[kind](), seed=1)
    js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    assert contents(other.odd) == saved
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("kind", ODD)
def test_nothing_changes_where_a_checkpoint_cannot_be_copied_into_the_model(tmp_path: Path, kind: str) -> None:
    model, optimizer = make(torch.ones(4, 4) if kind in ("sparse", "rows") else torch.ones(4))
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    other, other_optimizer = make(ODD[kind][0](), seed=1)
    weight, bias = other.weight.detach().clone(), other.bias.detach().clone()
    with pytest.raises(CheckpointError, match=f"'odd' of its state {ODD[kind][1]}"):
        js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    assert torch.equal(other.weight, weight) and torch.equal(other.bias, bias)


def test_several_values_are_not_loaded_where_the_model_expands_one(tmp_path: Path) -> None:
    model, optimizer = make(torch.arange(6.0).reshape(2, 3))
    js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    other, other_optimizer = make(torch.zeros(1, 3).expand(2, 3), seed=1)
    before = other.weight.detach().clone()
    with pytest.raises(CheckpointError, match="'odd' holds several values"):
        js.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    assert torch.equal(other.weight, before) and torch.equal(other.odd, torch.zeros(2, 3))


@pytest.mark.filterwarnings("ignore:passing over")
@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3), ()])
def test_forged_pairs_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Pairs of another number, of another kind."""
    model, optimizer = make(torch.ones(2, dtype=torch.complex128))
    folder = js.checkpoint.save(tmp_path, model=model, optimizer=optimizer)
    path = folder / "rank-0.safetensors"
    tensors = load_file(path)
    assert tensors.pop("complex128.model.odd").tolist() == [[1.0, 0.0]] * 2
    save_file(tensors | {"complex128.model.odd": torch.ones(shape, dtype=torch.float64)}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = sha256(path)
    (folder / "manifest.json").write_bytes(_sealed(manifest))
    with pytest.raises(CheckpointError):
        js.checkpoint.load(tmp_path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["sparse", "rows", "nested", "jagged", "meta"])
def test_a_mean_of_buffers_names_the_one_that_has_none(kind: str) -> None:
    def use(transport: js.comm.Transport) -> None:
        model, _ = make(ODD[kind][0]())
        model.register_buffer("plain", torch.tensor(float(transport.rank)))
        with pytest.raises(TypeError, match=f"buffer 'odd' {ODD[kind][1]}"):
            js.sync_buffers(model)
        assert model.plain == transport.rank
        model.odd = torch.tensor(1.0)
        js.sync_buffers(model)
        assert model.plain == 0.5

    run_simulated(2, use)


@pytest.mark.parametrize("odd_rank", [0, 1])
def test_ranks_of_which_one_has_a_sparse_buffer_all_learn_of_it(odd_rank: int) -> None:
    def use(transport: js.comm.Transport) -> None:
        eye = torch.eye(4)
        model, _ = make(eye.to_sparse() if transport.rank == odd_rank else eye)
        with pytest.raises(DesyncError, match="layouts of the model's buffers differ: rank 1 against rank 0"):
            js.sync_buffers(model)

    run_simulated(2, use)


def test_expanded_buffers_are_averaged() -> None:
    def use(transport: js.comm.Transport) -> tuple[torch.Tensor, torch.Tensor]:
        model, _ = make((torch.arange(3.0) + 4 * transport.rank).reshape(1, 3).expand(5, 3))
        model.register_buffer("after", torch.full((2,), float(transport.rank)))
        js.sync_buffers(model)
        return model.odd, model.after

    for odd, after in run_simulated(2, use):
        assert torch.equal(odd, (torch.arange(3.0) + 2).expand(5, 3)) and after.tolist() == [0.5, 0.5]
