"""What several test files share: array libraries behind one interface, sizes and tolerances."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from jointspar import comm

# Around the kernels' chunk of 16,384 elements and around the width of vector registers.
SIZES = (0, 1, 31, 32, 33, 16383, 16384, 16385, 100003)
DTYPES = ("float32", "float64", "bfloat16", "float16")
# Of stored values, by their dtype; of norms, by the dtype of what is summed (float32 lanes drift on short mantissas).
TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 2.0**-8, "float16": 2.0**-10}
NORM_TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 4e-6, "float16": 4e-6}


class Arrays(Protocol):
    """Makes and reads the arrays of one library."""

    name: str

    def array(self, values: Any, dtype: str = "float32") -> Any:
        """`values` rounded to `dtype`, in memory of their own; skips the test where the library lacks the dtype."""

    def bools(self, values: Any) -> Any:
        """Flags in memory of their own."""

    def float64(self, array: Any) -> np.ndarray:
        """The values on the host, widened exactly, in memory of their own."""

    def dtype_name(self, array: Any) -> str: ...


class TorchArrays:
    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def array(self, values: Any, dtype: str = "float32") -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float64)).to(getattr(torch, dtype)).to(self._device)

    def bools(self, values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=bool), device=self._device)

    def float64(self, array: torch.Tensor) -> np.ndarray:
        return array.detach().cpu().to(torch.float64).numpy().copy()

    def dtype_name(self, array: torch.Tensor) -> str:
        return str(array.dtype).removeprefix("torch.")


class NumpyArrays:
    name = "numpy"

    def array(self, values: Any, dtype: str = "float32") -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.array(values, dtype=np.float64).astype(dtype)

    def bools(self, values: Any) -> np.ndarray:
        return np.array(values, dtype=bool)

    def float64(self, array: np.ndarray) -> np.ndarray:
        return np.array(array, dtype=np.float64)

    def dtype_name(self, array: np.ndarray) -> str:
        return str(array.dtype)


def momentum_dtype(dtype: str) -> str:
    """The accumulator type of a parameter's dtype."""
    return "float64" if dtype == "float64" else "float32"


def at_odd_offset(arrays: Arrays, values: np.ndarray, dtype: str, offset: int) -> Any:
    """A view of `values` that starts `offset` elements into its memory, so on an odd alignment."""
    return arrays.array(np.concatenate([np.zeros(offset), values]), dtype)[offset:]


def bits(array: Any) -> bytes:
    """The bytes of a dense array, wherever it is."""
    if isinstance(array, torch.Tensor):
        flat = array.detach().cpu().resolve_neg().contiguous().flatten()
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return np.asarray(array.get() if hasattr(array, "get") else array).tobytes()  # get: CuPy's copy to the host


def exact_squared_norm(values: np.ndarray) -> float:
    """Summed in long doubles: exact enough for any tolerance here, and fast."""
    return float(np.square(values.ravel(), dtype=np.longdouble).sum())


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected magnitude; 0 for empty arrays."""
    actual, expected = np.atleast_1d(np.asarray(actual)), np.atleast_1d(np.asarray(expected))
    assert actual.shape == expected.shape
    if expected.size == 0:
        return 0.0
    largest = float(np.abs(expected).max())
    difference = float(np.abs(actual - expected).max())
    return difference / largest if largest > 0 else difference


def same_bits_on_1_and_2_threads(run: Callable[[], Sequence[Any]]) -> bool:
    """Whether `run` gives the same bytes on one torch thread and on two (on a device: in two runs)."""
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append([bits(array) for array in run()])
    return results[0] == results[1]


def launched(**options: Any) -> comm.transport.Transport:
    """The transport of the launcher that started this rank, also for one rank alone."""
    return comm.torch_dist(**options) if "TORCHELASTIC_RUN_ID" in os.environ else comm.mpi(**options)
