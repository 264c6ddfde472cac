"""How the run-time compiled backend finds, compiles, caches and loads the kernels, and what it asks NVRTC for."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nvrtc
from fake_cupy import FakeCupy, installed, serving

ROOT = Path(__file__).parents[2]
BACKENDS = ROOT / "python" / "jointspar" / "backends"
# One kernel of each template, and each that is none, with types that differ.
KERNELS = {
    "pack_gradients_kernel<double, jointspar::Float16>": ("pack_kernel.cuh",),
    "unpack_gradients_kernel<float, jointspar::BFloat16, true>": ("unpack_kernel.cuh",),
    "add_packed_kernel<jointspar::BFloat16>": ("unpack_kernel.cuh",),
    "squared_norms_kernel<jointspar::NormRecord>": ("squared_norms_kernel.cuh",),
    "squared_norms_kernel<jointspar::SgdRecord>": ("squared_norms_kernel.cuh", "sgd_update_kernel.cuh"),
    "lars_rates_kernel": ("lars_update_kernel.cuh",),
    "lars_update_kernel<jointspar::Float16, float>": ("lars_update_kernel.cuh",),
    "sgd_update_kernel<float, float>": ("sgd_update_kernel.cuh",),
    "sample_systematic_kernel": ("sample_kernel.cuh",),
    "sample_bernoulli_kernel": ("sample_kernel.cuh",),
    "project_probabilities_kernel": ("project_kernel.cuh",),
    "update_probabilities_kernel": ("update_probabilities_kernel.cuh",),
}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCupy]:
    cupy = FakeCupy(None)
    with serving(cupy, monkeypatch, tmp_path / "cache"):
        yield cupy


@pytest.fixture
def kernels(cupy: FakeCupy) -> Any:
    from jointspar.backends import cupy_kernels

    return cupy_kernels


def kernels_in_sources() -> set[tuple[str, tuple[str, ...]]]:
    """(name up to its types, headers) of each Kernel(...) that the backend's sources write down."""
    found = set()
    for path in BACKENDS.glob("cupy_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Kernel":
                name, headers = node.args
                found.add((ast.unparse(name).strip("f'").partition("<")[0], ast.literal_eval(headers)))
    return found


def test_the_list_above_has_every_kernel_that_is_launched() -> None:
    listed = {(name.partition("<")[0], headers) for name, headers in KERNELS.items()}
    drawn = {("sample_systematic_kernel", ("sample_kernel.cuh",)), ("sample_bernoulli_kernel", ("sample_kernel.cuh",))}
    assert listed - drawn | {("sample_{draw}_kernel", ("sample_kernel.cuh",))} == kernels_in_sources()


@pytest.mark.parametrize("name", KERNELS)
def test_nvrtc_compiles_what_the_backend_asks_for(kernels: Any, name: str) -> None:
    kernel = kernels.Kernel(name, KERNELS[name])
    options = kernels.options_for("90")
    cubin, log = nvrtc.compile_to_cubin(
        kernels.source_of(kernel), "kernel.cu", [kernels.expression_of(kernel)], options
    )
    assert log.strip() == ""
    assert name.partition("<")[0].encode() in cubin
    assert "--fmad=false" in options
    assert not any("ftz" in option or "fast" in option for option in options)


def test_compiled_kernels_are_read_from_the_cache(cupy: FakeCupy, kernels: Any) -> None:
    kernel = kernels.Kernel("lars_rates_kernel", ("lars_update_kernel.cuh",))
    first = kernels.compiled(kernel, "90")
    assert first == ("jointspar::lars_rates_kernel", b"\x7fELF\njointspar::lars_rates_kernel")
    assert kernels.compiled(kernel, "90") == first
    assert cupy.num_compiled == 1
    kernels.compiled(kernel, "80")
    kernels.compiled(kernels.Kernel("lars_update_kernel<float, float>", kernel.headers), "90")
    assert cupy.num_compiled == 3


def test_a_changed_header_or_compiler_is_not_served_from_the_cache(
    cupy: FakeCupy, kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    monkeypatch.setattr(kernels, "sources", lambda: csrc)
    kernel = kernels.Kernel("lars_rates_kernel", ("lars_update_kernel.cuh",))
    kernels.compiled(kernel, "90")
    header = csrc / "common" / "device_chunks.h"
    header.write_text(header.read_text() + "\n// changed\n")
    kernels._digest_of_sources.cache_clear()
    kernels.compiled(kernel, "90")
    assert cupy.num_compiled == 2
    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", lambda: (13, 1))
    kernels.compiled(kernel, "90")
    assert cupy.num_compiled == 3


def test_a_cache_that_cannot_be_written_does_no_harm(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    name, _ = kernels.compiled(kernels.Kernel("lars_rates_kernel", ("lars_update_kernel.cuh",)), "90")
    assert name == "jointspar::lars_rates_kernel"


def test_what_nvrtc_complains_about_is_passed_on(cupy: FakeCupy, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: int, options: tuple[str, ...]) -> None:
        raise cupy.cuda.nvrtc.NVRTCError("NVRTC_ERROR_COMPILATION")

    monkeypatch.setattr(cupy.cuda.nvrtc, "compileProgram", refuse)
    monkeypatch.setattr(cupy.cuda.nvrtc, "getProgramLog", lambda program: "line 3: no such type")
    with pytest.raises(RuntimeError, match=r"(?s)lars_rates_kernel.*COMPILATION.*line 3: no such type"):
        kernels.compile_kernel(kernels.Kernel("lars_rates_kernel", ("lars_update_kernel.cuh",)), "90")


def test_the_installed_cupy_compiles_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    from jointspar.backends import cupy_kernels

    try:
        real.cuda.nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"CuPy finds no NVRTC: {error}")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    for name, headers in KERNELS.items():
        kernel = cupy_kernels.Kernel(name, headers)
        lowered, code = cupy_kernels.compiled(kernel, "90")
        assert lowered.encode() in code
        assert cupy_kernels.compiled(kernel, "90") == (lowered, code)


def test_an_installation_holds_the_cuda_sources_and_finds_them(tmp_path: Path) -> None:
    """The Python part of a wheel; building the compiled part takes a minute and changes nothing about it."""
    base, installed_at = tmp_path / "egg", tmp_path / "lib"
    base.mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(base)]
    subprocess.run([*command, "build_py", "--build-lib", str(installed_at)], cwd=ROOT, check=True, capture_output=True)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2])\n"
        "import fake_cupy; sys.modules['cupy'] = fake_cupy.FakeCupy(None)\n"
        "from jointspar.backends import cupy_kernels; print(cupy_kernels.sources())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [sys.executable, "-c", script, str(ROOT / "tests"), str(installed_at)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == installed_at / "jointspar" / "csrc"
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix == ".cuh" or (path.suffix == ".h" and path.is_relative_to(ROOT / "csrc" / "common")):
            copy = installed_at / "jointspar" / path.relative_to(ROOT)
            assert copy.read_bytes() == path.read_bytes()


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from jointspar import backends
    from jointspar.device_arrays import Place

    monkeypatch.setenv("JOINTSPAR_BACKEND", "cupy")
    with installed(SimpleNamespace()):  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(RuntimeError, match=r"pip install 'jointspar\[cuda\]'"):
            backends.device_backend(Place(0, "torch"), None)
