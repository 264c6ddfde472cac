"""jointspar: communication-efficient large-batch training by sampling layers (Liu & Mozafari, ICML 2022)."""

from jointspar import checkpoint, comm, errors, ops, schedule
from jointspar.optimizers import JointSparLARS, JointSparSGD
from jointspar.replicas import sync_buffers
from jointspar.step.sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "JointSparLARS",
    "JointSparSGD",
    "Sampling",
    "checkpoint",
    "comm",
    "errors",
    "ops",
    "schedule",
    "sync_buffers",
]
