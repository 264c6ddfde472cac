"""Stage 4, packed_grad to mean_grad: several ways to sum one packed buffer over the ranks, behind one interface."""

from jointspar.step.exchange.allreduce import allreduce
from jointspar.step.exchange.choose import Exchange, choose
from jointspar.step.exchange.ring import ring

__all__ = ["Exchange", "allreduce", "choose", "ring"]
