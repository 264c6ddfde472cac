"""What the tests on a GPU share: CuPy's arrays, work that keeps a stream busy, and why there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda"


def why_no_gpu() -> str | None:
    """What is missing for tests on a GPU, None where nothing is."""
    if torch.version.cuda is None:
        return f"needs a GPU: torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "needs a GPU: torch finds none"


class CupyArrays:
    """See `support.Arrays`."""

    name = "cupy"

    def __init__(self) -> None:
        self._cupy = pytest.importorskip("cupy")

    def array(self, values: Any, dtype: str = "float32") -> Any:
        if dtype == "bfloat16":
            pytest.skip("CuPy has no bfloat16")
        with np.errstate(over="ignore"):
            return self._cupy.asarray(np.asarray(values, dtype=np.float64).astype(dtype))

    def bools(self, values: Any) -> Any:
        return self._cupy.asarray(np.asarray(values, dtype=bool))

    def float64(self, array: Any) -> np.ndarray:
        return array.get().astype(np.float64)

    def dtype_name(self, array: Any) -> str:
        return str(array.dtype)


def keep_busy(milliseconds: float = 20.0) -> None:
    """Put a kernel on the current stream that does nothing for about this long."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))  # cycles, of cards that run at about 1.5 GHz
