"""The compiled kernels of jointspar. `jointspar_ext._core` has the functions; use them through `jointspar.ops`."""

import contextlib

# torch first: the kernels then share the OpenMP runtime, and thereby the threads, that it brings along.
with contextlib.suppress(ImportError):
    import torch  # noqa: F401
