"""Methods to compare with: lossy compression of dense gradients, each as its paper has it, in plain torch code.

An exchange from here takes the place of the optimizer's `exchange`: what it sends is what the transport counts, and the
mean gradient that it gives is applied by SGD or LARS as any other.
"""

from jointspar.training.baselines.compressors import Compressor, Qsgd, ScaledSign, TernGrad, TopK
from jointspar.training.baselines.gathered import Gathered
from jointspar.training.baselines.powersgd import PowerSgd
from jointspar.training.baselines.random_k import RandomK

__all__ = ["Compressor", "Gathered", "PowerSgd", "Qsgd", "RandomK", "ScaledSign", "TernGrad", "TopK"]
