"""What works in environments other than the one the tests run in: fewer packages, older torch."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import warm_python

ROOT = Path(__file__).parents[2]
TRAIN = """
import torch, jointspar as js
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))
optimizer = js.JointSparLARS(model.named_parameters(), lr=0.5, sampling=js.Sampling(budget=1))
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    optimizer.step()
print(js.ops.backend().__name__, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().norm().item())
"""
BLOCK = "import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"  # None: as if not installed
OLDER_TORCH = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
"""


@functools.cache
def run(script: str, python: Callable[..., list[str]] = warm_python.command) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("JOINTSPAR_BACKEND", None)
    result = subprocess.run(
        python("-c", script), env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_plain_install_trains_without_mpi_or_any_extra() -> None:
    blocked = ["mpi4py", "matplotlib", "numba", "sklearn", "tqdm", "PIL"]
    output = run(BLOCK.format(blocked=blocked) + TRAIN, lambda *arguments: [sys.executable, *arguments])
    assert output.startswith("jointspar.backends.native")


@pytest.mark.parametrize(
    ("blocked", "module"), [(["jointspar_ext"], "numba_cpu"), (["jointspar_ext", "numba"], "reference")]
)
def test_another_backend_serves_where_nothing_was_compiled(blocked: list[str], module: str) -> None:
    native, other = run(TRAIN).split(), run(BLOCK.format(blocked=blocked) + TRAIN).split()
    assert (native[0], other[0]) == ("jointspar.backends.native", f"jointspar.backends.{module}")
    assert float(native[1]) == pytest.approx(float(other[1]), rel=1e-5)


def test_numba_is_not_imported_where_it_does_not_serve() -> None:
    assert run(TRAIN + "import sys\nprint('numba' in sys.modules)\n").endswith("False\n")


def test_numba_works_without_a_folder_for_its_cache() -> None:
    nowhere = "import os\nos.environ.update(JOINTSPAR_BACKEND='numba', NUMBA_CACHE_LOCATOR_CLASSES='ZipCacheLocator')\n"
    assert run(nowhere + TRAIN).startswith("jointspar.backends.numba_cpu")


def test_torch_without_the_fast_exchange_of_arrays_gives_the_same() -> None:
    assert run(OLDER_TORCH + TRAIN) == run(TRAIN)


def test_an_unknown_backend_is_refused_by_name() -> None:
    script = "import jointspar as js\ntry:\n    js.ops.backend()\nexcept ValueError as error:\n    print(error)"
    before = "import os\nos.environ['JOINTSPAR_BACKEND'] = 'fast'\n"
    assert "JOINTSPAR_BACKEND" in run(before + script)
