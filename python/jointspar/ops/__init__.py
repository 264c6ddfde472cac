"""The fused operations of a JointSpar step, for torch tensors, NumPy and CuPy arrays, on the CPU or one CUDA device.

Arrays are read in memory order and must be dense (contiguous after some permutation of their dimensions, as
channels_last is); arrays that belong together (parameter, momentum, gradient) have the same shape and strides.
Small per-tensor vectors come back in the array library of the input. Bad arguments raise ValueError or TypeError
naming the argument; nothing was written then. The `native` backend also takes buffers such as array.array. Code that
torch.compile compiles calls these outside of it: they are no torch operations, and break its graphs.

On CUDA arrays (torch, CuPy, or anything with DLPack or `__cuda_array_interface__`) an operation is put on the current
stream of torch or CuPy, or on the one that an array of another library names, and returns at once: results are device
arrays, and no value of a device array is looked at, so that NaN or out-of-range values in them raise nothing. An array
of another library is asked by DLPack to be ready for that stream; the library itself has to wait for what is written
into one. Settings given as device arrays are copied to the host, and norms, probabilities or a bound given as host
values to the device: both wait.
"""

from jointspar.ops.packing import add_packed, pack_gradients, squared_norms, unpack_gradients
from jointspar.ops.probabilities import (
    DRAWS,
    STRATEGIES,
    project_probabilities,
    sample_layers,
    update_probabilities,
)
from jointspar.ops.serving import backend, use_backend
from jointspar.ops.updates import LarsNorms, lars_update, sgd_update

__all__ = [
    "DRAWS",
    "STRATEGIES",
    "LarsNorms",
    "add_packed",
    "backend",
    "lars_update",
    "pack_gradients",
    "project_probabilities",
    "sample_layers",
    "sgd_update",
    "squared_norms",
    "unpack_gradients",
    "update_probabilities",
    "use_backend",
]
